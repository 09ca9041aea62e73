//! Clients that were started once, with the certificates of that time, go on while the agent is
//! restarted, killed and given another host: the agent's root outlives its process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::support::counts::reached;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World, assert_issued, audit_lines};
use crate::support::{eventually, has_program, hold_port};

const ORDERS: &str = "https://orders.example.test/v1/orders";
const ADDED: &str = "https://origin.example.test/v1/orders";

const ADDED_DESTINATION: &str = r#"
  - {name: added, hosts: [origin.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: "{api}"}
"#;

/// How often each client is served in each state of the agent.
const SERVED: usize = 10;

/// `countersign run`, as a process of its own.
struct Agent {
    configuration: PathBuf,
    address: String,
    process: Child,
}

impl Agent {
    async fn start(configuration: PathBuf, address: String) -> Self {
        let process = Self::launch(&configuration);
        let mut agent = Self {
            configuration,
            address,
            process,
        };
        agent.until_it_listens().await;
        agent
    }

    fn launch(configuration: &Path) -> Child {
        Command::new(env!("CARGO_BIN_EXE_countersign"))
            .args(["run", "--config"])
            .arg(configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    async fn until_it_listens(&mut self) {
        eventually(Duration::from_secs(30), || async {
            TcpStream::connect(&self.address).await.ok()
        })
        .await;
        assert_eq!(self.process.try_wait().unwrap(), None, "the agent ended");
    }

    /// Ends the process by a signal, and starts another.
    async fn again_after(&mut self, signal: Signal) {
        let pid = Pid::from_raw(self.process.id().unwrap().try_into().unwrap());
        kill(pid, signal).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(30), self.process.wait()).await;
        let status = ended.expect("the agent ends").unwrap();
        assert_eq!(status.success(), signal == Signal::SIGTERM, "{status}");
        self.process = Self::launch(&self.configuration);
        self.until_it_listens().await;
    }
}

/// A client that asks without pause.
struct Busy {
    name: &'static str,
    /// What it asks for now.
    url: Arc<Mutex<&'static str>>,
    /// What it was answered: the URL, and what the program said.
    answers: Arc<Mutex<Vec<(&'static str, String)>>>,
    task: JoinHandle<()>,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Busy {
    fn start(name: &'static str, mut command: Command, proxy: &str, root: &Path) -> Self {
        let mut child = command
            .arg(proxy)
            .arg(root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let url = Arc::new(Mutex::new(ORDERS));
        let answers = Arc::new(Mutex::new(Vec::new()));
        let (asks, answered) = (Arc::clone(&url), Arc::clone(&answers));
        let task = tokio::spawn(async move {
            let _child = child;
            loop {
                let url = *asks.lock().unwrap();
                stdin
                    .write_all(format!("{url}\n").as_bytes())
                    .await
                    .unwrap();
                let answer = lines.next_line().await.unwrap().expect("the client lives");
                answered.lock().unwrap().push((url, answer));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Self {
            name,
            url,
            answers,
            task,
        }
    }

    fn ask_for(&self, url: &'static str) {
        *self.url.lock().unwrap() = url;
    }

    fn served(&self, url: &str) -> usize {
        let answers = self.answers.lock().unwrap();
        answers
            .iter()
            .filter(|(asked, answer)| *asked == url && is_success(answer))
            .count()
    }

    /// Waits until it was served [`SERVED`] times more.
    async fn is_served(&self, url: &'static str) {
        let before = self.served(url);
        let limit = Duration::from_secs(60);
        let served = eventually(limit, || async {
            (self.served(url) >= before + SERVED).then_some(())
        });
        let name = self.name;
        tokio::select! {
            () = served => {}
            () = tokio::time::sleep(limit - Duration::from_secs(1)) => {
                let last = self.answers.lock().unwrap().last().cloned();
                panic!("{name} is not served: {last:?}");
            }
        }
    }
}

fn is_success(answer: &str) -> bool {
    answer.starts_with("200 ")
}

async fn all_are_served(clients: &[Busy], url: &'static str) {
    for client in clients {
        client.is_served(url).await;
    }
}

async fn start_clients(proxy: &str, root: &Path, directory: &Path) -> Vec<Busy> {
    let test = "clients_outlive_the_agent";
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/agent/clients");
    let mut clients = Vec::new();
    if has_program(test, "go") {
        let program = directory.join("client");
        let built = Command::new("go")
            .args(["build", "-o"])
            .arg(&program)
            .arg(programs.join("client.go"))
            .env("GOTOOLCHAIN", "local")
            .env("GOFLAGS", "")
            .current_dir(directory)
            .output()
            .await
            .unwrap();
        assert!(built.status.success(), "{built:?}");
        clients.push(Busy::start("Go", Command::new(program), proxy, root));
    }
    for (name, interpreter, file) in [
        ("Node", "node", "client.mjs"),
        ("Python", "python3", "client.py"),
    ] {
        if has_program(test, interpreter) {
            let mut command = Command::new(interpreter);
            command.arg(programs.join(file));
            clients.push(Busy::start(name, command, proxy, root));
        }
    }
    clients
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_outlive_the_agent() {
    let world = World::servers().await;
    // The port stays the same over restarts.
    let (_port, address) = hold_port(0).unwrap();
    let address = address.to_string();
    let common = COMMON.replacen("127.0.0.1:0", &address, 1);
    let configuration = world.fill(&format!("{common}{DESTINATIONS}"));
    let with_another_host = world.fill(&format!("{common}{DESTINATIONS}{ADDED_DESTINATION}"));
    world.write_policies(POLICIES);
    world.write("countersign.yaml", &configuration);
    let mut agent = Agent::start(world.path("countersign.yaml"), address.clone()).await;
    let root = world.path("ca.pem");
    let certificate = eventually(Duration::from_secs(30), || async {
        std::fs::read(&root).ok()
    })
    .await;
    let proxy = format!("http://{address}");
    let clients = start_clients(&proxy, &root, world.directory.path()).await;
    all_are_served(&clients, ORDERS).await;

    agent.again_after(Signal::SIGTERM).await;
    all_are_served(&clients, ORDERS).await;

    agent.again_after(Signal::SIGKILL).await;
    all_are_served(&clients, ORDERS).await;

    // The running agent finds the changed file by itself; until then the host is refused.
    for client in &clients {
        assert_eq!(client.served(ADDED), 0);
        client.ask_for(ADDED);
    }
    world.write("countersign.yaml", &with_another_host);
    all_are_served(&clients, ADDED).await;
    for client in &clients {
        client.ask_for(ORDERS);
    }
    all_are_served(&clients, ORDERS).await;

    for client in &clients {
        client.ask_for(ADDED);
    }
    agent.again_after(Signal::SIGKILL).await;
    all_are_served(&clients, ADDED).await;

    assert_eq!(std::fs::read(&root).unwrap(), certificate);
    let mut served = 0;
    for client in &clients {
        let answers = client.answers.lock().unwrap().clone();
        let mut failures = BTreeMap::new();
        for (url, answer) in answers.iter().filter(|(_, answer)| !is_success(answer)) {
            assert!(!answer.starts_with("tls "), "{}: {answer}", client.name);
            // While the agent is away, stops, or does not know the host yet.
            let is_expected = ["connection ", "503 "]
                .iter()
                .any(|start| answer.starts_with(start));
            assert!(is_expected || *url == ADDED, "{}: {answer}", client.name);
            *failures.entry(answer).or_insert(0) += 1;
        }
        println!(
            "{}: {} requests; not served: {failures:#?}",
            client.name,
            answers.len()
        );
        served += client.served(ORDERS) + client.served(ADDED);
    }
    let seen = world.api.seen();
    assert!(seen.len() >= served);
    for seen in &seen {
        assert_issued(&world, seen);
    }
    // The audit went on in one chain, over the kills too.
    let starts = audit_lines(&world.path("audit.jsonl"))
        .iter()
        .filter(|line| line["event"] == "start")
        .count();
    assert_eq!(starts, 4);
    if clients.len() == 3 {
        reached("clients_served", served);
    }

    // With another root they would have failed, and said so.
    std::fs::remove_dir_all(world.path("ca")).unwrap();
    agent.again_after(Signal::SIGKILL).await;
    for client in &clients {
        eventually(Duration::from_secs(30), || async {
            let last = client.answers.lock().unwrap().last().cloned();
            last.filter(|(_, answer)| answer.starts_with("tls "))
        })
        .await;
    }
}

//! An agent that has much to do for long keeps neither memory nor descriptors.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::descriptors::descriptors;
use super::{PLAIN, forgetful_origin};
use crate::support::agent::Agent;
use crate::support::client::Client;
use crate::support::counts::reached;
use crate::support::puppet::Puppet;
use crate::support::raw::exchange;
use crate::support::repetitions::are_full;
use crate::support::world::{DESTINATIONS, POLICIES, World};

const REFUSED: &str =
    "DELETE http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";

/// Resident memory in KiB (proc_pid_status(5)).
fn resident(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

/// Something of everything; how many requests were answered.
async fn cycle(agent: &Agent, puppet: &Puppet, root: &Path) -> usize {
    let mut answered = 0;
    let proxy = agent.world.path("proxy.sock");
    for _ in 0..20 {
        let mut io = BufReader::new(UnixStream::connect(&proxy).await.unwrap());
        for _ in 0..10 {
            exchange(&mut io, PLAIN).await.expect(200);
            answered += 1;
        }
        exchange(&mut io, REFUSED).await.expect(403);
        answered += 1;
    }
    for _ in 0..5 {
        let mut io = BufReader::new(puppet.connect().await);
        exchange(&mut io, PLAIN).await.expect(200);
        answered += 1;
        // One that leaves in the middle of a request.
        let upload = "POST http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\ncontent-length: 9999\r\n\r\nx";
        io.write_all(upload.as_bytes()).await.unwrap();
    }
    for is_http2 in [false, true] {
        let mut client = Client::tls(puppet, "orders.example.test", root, is_http2).await;
        let uri = match is_http2 {
            true => "https://orders.example.test/v1/orders",
            false => "/v1/orders",
        };
        assert_eq!(client.get(uri, "orders.example.test").await.unwrap().0, 200);
        answered += 1;
    }
    answered
}

fn median(values: &[usize]) -> usize {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_descriptors_are_flat() {
    // In some seconds little is seen but what is lost at every request.
    let (duration, allowed) = match are_full() {
        true => (Duration::from_secs(20 * 60), 1.05),
        false => (Duration::from_secs(4), 1.25),
    };
    let mut world = World::servers().await;
    world
        .origins
        .push(("plain".to_owned(), forgetful_origin().await));
    // So that tokens are renewed all the time.
    world
        .authorization_server
        .state()
        .set_token_lifetime(Duration::from_secs(10));
    let agent = Agent::start_in(world, None, DESTINATIONS, POLICIES).await;
    let root = agent.world.path("ca.pem");
    let puppet = Puppet::start(&agent.address, None).await;
    let began = Instant::now();
    let (mut answered, mut memory, mut open) = (0, Vec::new(), Vec::new());
    let mut reported = 0;
    while began.elapsed() < duration || memory.len() < 16 {
        answered += cycle(&agent, &puppet, &root).await;
        if memory.len() % 10 == 9 {
            agent
                .world
                .write_policies(&format!("{POLICIES}// {}\n", memory.len()));
            agent.signal(Signal::SIGHUP);
        }
        memory.push(resident(agent.pid()));
        open.push(descriptors(agent.pid()));
        let minutes = began.elapsed().as_secs() / 60;
        if minutes > reported {
            reported = minutes;
            println!(
                "after {minutes} minutes: {answered} answered, {} KiB resident, {} descriptors",
                memory[memory.len() - 1],
                open[open.len() - 1]
            );
        }
    }
    let quarter = memory.len() / 4;
    let of = |values: &[usize], from: usize| median(&values[from * quarter..(from + 1) * quarter]);
    let grown = of(&memory, 3) as f64 / of(&memory, 1) as f64;
    println!(
        "{answered} requests in {} cycles and {:.0?}: resident memory {} KiB in the second quarter and {} KiB in the last, \
         descriptors {} and {}",
        memory.len(),
        began.elapsed(),
        of(&memory, 1),
        of(&memory, 3),
        of(&open, 1),
        of(&open, 3),
    );
    assert!(grown <= allowed, "memory grew to {grown:.3}");
    assert!(of(&open, 3) <= of(&open, 1) + 8, "descriptors");
    // Of so many requests the API forgets the first: it counts no further.
    let orders = "https://orders.example.test/v1/orders";
    agent.curl(None, orders).await.expect(200);
    reached("soaked", answered);
}

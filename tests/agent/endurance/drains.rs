//! SIGTERM under load.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::support::agent::Agent;
use crate::support::counts::reached;
use crate::support::eventually;
use crate::support::raw::{read_head, read_response};
use crate::support::repetitions::repetitions;
use crate::support::world::{DESTINATIONS, POLICIES, World};

const SLOW: &str = "  - {name: slow, hosts: [slow.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{slow}\"}\n";
const REQUEST: &str = "GET http://slow.example.test/ HTTP/1.1\r\nHost: slow.example.test\r\n\r\n";
/// How many parts an answer has.
const PARTS: usize = 125;
const PART: &str = "4\r\npart\r\n";

/// An origin that begins every answer, counts it, and goes on once it may.
async fn start_origin(begun: Arc<AtomicUsize>, may_go_on: CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (begun, may_go_on) = (Arc::clone(&begun), may_go_on.clone());
            tokio::spawn(async move {
                read_head(&mut stream).await;
                let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
                let begin = format!("{head}{PART}");
                stream.write_all(begin.as_bytes()).await.unwrap();
                begun.fetch_add(1, Ordering::Relaxed);
                may_go_on.cancelled().await;
                let end = PART.repeat(PARTS - 1) + "0\r\n\r\n";
                stream.write_all(end.as_bytes()).await.unwrap();
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_is_cut_off_by_a_sigterm() {
    const CALLERS: usize = 100;
    let drains = repetitions(20);
    let mut answered = 0;
    for _ in 0..drains {
        let (begun, may_go_on) = (Arc::<AtomicUsize>::default(), CancellationToken::new());
        let origin = start_origin(Arc::clone(&begun), may_go_on.clone()).await;
        let mut world = World::servers().await;
        world.origins.push(("slow".to_owned(), origin));
        let mut agent =
            Agent::start_in(world, None, &format!("{DESTINATIONS}{SLOW}"), POLICIES).await;
        let mut callers = Vec::new();
        for _ in 0..CALLERS {
            let mut io = UnixStream::connect(agent.world.path("proxy.sock"))
                .await
                .unwrap();
            callers.push(tokio::spawn(async move {
                io.write_all(REQUEST.as_bytes()).await.unwrap();
                let answer = read_response(&mut io).await.expect(200);
                // And then the connection ends in good order.
                assert_eq!(io.read(&mut [0]).await.unwrap(), 0);
                answer.body.len()
            }));
        }
        eventually(Duration::from_secs(60), || async {
            (begun.load(Ordering::Relaxed) == CALLERS).then_some(())
        })
        .await;
        agent.signal(Signal::SIGTERM);
        eventually(Duration::from_secs(20), || async {
            (agent.admin("GET", "/readyz").await.status == 503).then_some(())
        })
        .await;
        assert!(callers.iter().all(|caller| !caller.is_finished()));
        may_go_on.cancel();
        assert!(agent.ended().await.success());
        for caller in callers {
            assert_eq!(caller.await.unwrap(), PARTS * "part".len());
            answered += 1;
        }
    }
    println!("{drains} SIGTERM, {answered} answers were under way, 0 were cut off");
    reached("answered_while_draining", answered);
}

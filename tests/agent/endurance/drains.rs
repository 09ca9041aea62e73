//! SIGTERM under load.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::support::agent::Agent;
use crate::support::counts::reached;
use crate::support::eventually;
use crate::support::origin::Origin;
use crate::support::raw::read_response;
use crate::support::repetitions::repetitions;
use crate::support::world::{DESTINATIONS, POLICIES, World};

const SLOW: &str = "  - {name: slow, hosts: [slow.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{slow}\"}\n";
const REQUEST: &str = "GET http://slow.example.test/ HTTP/1.1\r\nHost: slow.example.test\r\n\r\n";
/// An answer of so many parts takes some 20 ms for each.
const PARTS: usize = 125;

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_is_cut_off_by_a_sigterm() {
    const CALLERS: usize = 100;
    let drains = repetitions(20);
    let mut answered = 0;
    for _ in 0..drains {
        let origin = Origin::start(None, |_| {
            let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
            let parts = (0..PARTS).map(|_| "4\r\npart\r\n".to_owned());
            [head]
                .into_iter()
                .chain(parts)
                .chain(["0\r\n\r\n".to_owned()])
                .collect()
        })
        .await;
        let mut world = World::servers().await;
        world.origins.push(("slow".to_owned(), origin.address));
        let mut agent =
            Agent::start_in(world, None, &format!("{DESTINATIONS}{SLOW}"), POLICIES).await;
        let mut callers = Vec::new();
        for _ in 0..CALLERS {
            let mut io = UnixStream::connect(agent.world.path("proxy.sock"))
                .await
                .unwrap();
            callers.push(tokio::spawn(async move {
                tokio::io::AsyncWriteExt::write_all(&mut io, REQUEST.as_bytes())
                    .await
                    .unwrap();
                let answer = read_response(&mut io).await.expect(200);
                // And then the connection ends in good order.
                assert_eq!(io.read(&mut [0]).await.unwrap(), 0);
                answer.body.len()
            }));
        }
        eventually(Duration::from_secs(20), || async {
            (origin.heads().len() == CALLERS).then_some(())
        })
        .await;
        assert!(callers.iter().all(|caller| !caller.is_finished()));
        assert!(agent.end(Signal::SIGTERM).await.success());
        for caller in callers {
            assert_eq!(caller.await.unwrap(), PARTS * "part".len());
            answered += 1;
        }
    }
    println!("{drains} SIGTERM, {answered} answers were under way, 0 were cut off");
    reached("answered_while_draining", answered);
}

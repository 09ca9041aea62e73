//! Callers of whom the kernel does not say who they are.

use std::io::Write;
use std::net::{Shutdown, TcpStream};

use crate::support::counts::reached;
use crate::support::puppet::share_and_send;
use crate::support::raw::read_response_blocking;
use crate::support::world::World;

const PLAIN: &str =
    "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_cannot_be_named_gets_no_credential() {
    let world = World::start().await;
    world.good().await;
    let mut unknown = 0;

    // One socket in two programs: either may have sent it.
    let answer = share_and_send(&world.target("proxy"), PLAIN).await;
    assert!(answer.contains("HTTP/1.1 403 "), "{answer}");
    assert!(answer.contains("\"code\":\"caller_ambiguous\""), "{answer}");
    assert!(world.plain_api.seen().is_empty());
    let record = world.audited_requests().await.pop().unwrap();
    assert_eq!(record["outcome"], "caller_ambiguous", "{record}");
    assert!(record["session"].is_null(), "{record}");
    unknown += 1;
    world.good().await;

    // One that has closed its half before it was looked at: the kernel no longer says whose it is.
    // Where the agent was faster, the caller is known, and served.
    let mut served = 0;
    loop {
        let mut io = TcpStream::connect(world.address("proxy")).unwrap();
        io.write_all(PLAIN.as_bytes()).unwrap();
        io.shutdown(Shutdown::Write).unwrap();
        let answer = tokio::task::spawn_blocking(move || read_response_blocking(&mut io))
            .await
            .unwrap();
        // What another test starts holds it, too, until it executes.
        if answer.contains("\"code\":\"caller_ambiguous\"") {
            continue;
        }
        if answer.contains("\"code\":\"caller_gone\"") {
            assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
            break;
        }
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        served += 1;
        assert!(served < 1000, "the agent is always faster");
    }
    unknown += 1;
    assert_eq!(world.plain_api.seen().len(), served);
    let record = world.audited_requests().await.pop().unwrap();
    assert_eq!(record["outcome"], "caller_gone", "{record}");
    assert!(record["session"].is_null(), "{record}");
    world.good().await;
    reached("callers_unknown", unknown);
}

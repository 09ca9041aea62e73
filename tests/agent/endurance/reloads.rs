//! Reloads under load: each changes an answer, and drops nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::time::MissedTickBehavior;

use super::forgetful_origin;
use crate::support::agent::Agent;
use crate::support::counts::reached;
use crate::support::raw::{Response, exchange};
use crate::support::repetitions::{are_full, repetitions};
use crate::support::world::{DESTINATIONS, POLICIES, World};

/// Requests per second.
const RATE: u32 = 1000;
const CLIENTS: u32 = 20;

const FORBID: &str = r#"
@id("now-and-then")
forbid (principal, action, resource) when { context has request && context.request.path == "/v1/orders/7" };
"#;

async fn get(io: &mut BufReader<UnixStream>, path: &str) -> Response {
    let request =
        format!("GET http://plain.example.test{path} HTTP/1.1\r\nHost: plain.example.test\r\n\r\n");
    exchange(io, &request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_dropped_over_reloads_of_which_each_changes_an_answer() {
    let reloads = repetitions(1000);
    let mut world = World::servers().await;
    let origin = ("plain".to_owned(), forgetful_origin().await);
    world.origins.push(origin);
    let agent = Agent::start_in(world, None, DESTINATIONS, POLICIES).await;
    agent.good(None).await;
    let proxy = agent.world.path("proxy.sock");
    let connect = async || BufReader::new(UnixStream::connect(&proxy).await.unwrap());
    let (answered, over) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut io = connect().await;
        let (answered, over) = (Arc::clone(&answered), Arc::clone(&over));
        clients.push(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) * CLIENTS / RATE);
            // Who was late catches up.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut longest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                ticks.tick().await;
                let asked = Instant::now();
                get(&mut io, "/v1/orders").await.expect(200);
                longest = longest.max(asked.elapsed());
                answered.fetch_add(1, Ordering::Relaxed);
            }
            longest
        }));
    }

    let mut io = connect().await;
    let mut admin = UnixStream::connect(agent.world.path("admin.sock"))
        .await
        .unwrap();
    let began = Instant::now();
    let mut changed = 0;
    for reload in 0..reloads {
        let (policies, status) = match reload % 2 {
            0 => (format!("{POLICIES}{FORBID}"), 403),
            _ => (POLICIES.to_owned(), 200),
        };
        agent.world.write_policies(&policies);
        let request = "POST /v1/reload HTTP/1.1\r\nHost: agent\r\n\r\n";
        exchange(&mut admin, request).await.expect(200);
        get(&mut io, "/v1/orders/7").await.expect(status);
        changed += 1;
    }
    let took = began.elapsed();
    let rate = answered.load(Ordering::Relaxed) as f64 / took.as_secs_f64();
    over.store(true, Ordering::Relaxed);
    let mut longest = Duration::ZERO;
    for client in clients {
        longest = longest.max(client.await.unwrap());
    }
    println!(
        "{reloads} reloads in {took:.1?}, {changed} answers changed, {} requests answered, {rate:.0} in a second, \
         the slowest after {longest:?}",
        answered.load(Ordering::Relaxed)
    );
    // A tenth is also run where other tests take their share of the machine.
    assert!(
        !are_full() || rate >= 0.95 * f64::from(RATE),
        "{rate:.0} in a second"
    );
    agent.good(None).await;
    reached("reloads_under_load", changed);
}

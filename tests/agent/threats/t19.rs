//! T19: one identity that asks for as much as it can, and another that wants its answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::support::counts::reached;
use crate::support::http2_frames::{
    END_HEADERS, END_STREAM, HEADERS, RST_STREAM, SETTINGS, field, frame,
};
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, read_head};
use crate::support::repetitions::are_full;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};
use crate::support::{NOBODY, is_root};

/// How many requests the destination serves at once, and how long each takes.
const SLOTS: usize = 8;
const SERVICE: Duration = Duration::from_millis(50);
/// What an identity may have in flight: not all that the destination serves.
const LIMITS: &str = "limits: {per_identity: {requests_in_flight: 4}}\n";

const FLOOD: usize = 64;
/// How long the attacker waits once it is refused: the limits are tested, not the machine.
const PAUSE: Duration = Duration::from_millis(250);
const SLOW_HEADS: usize = 256;
const REQUESTS: usize = 60;
/// A machine that is busy with something else may spoil a comparison.
const ATTEMPTS: usize = 10;

const DESTINATION: &str = "  - {name: slow, hosts: [slow.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{slow}\"}\n";

const REQUEST: &str = "GET http://slow.example.test/ HTTP/1.1\r\nHost: slow.example.test\r\n\r\n";

/// A destination that has so many hands and no more.
async fn start_destination() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let slots = Arc::new(Semaphore::new(SLOTS));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let slots = Arc::clone(&slots);
            tokio::spawn(async move {
                while !read_head(&mut stream).await.is_empty() {
                    let slot = slots.acquire().await.unwrap();
                    tokio::time::sleep(SERVICE).await;
                    drop(slot);
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Asks one request after the other; the time that 99 in 100 are answered in.
async fn p99(caller: &Puppet) -> Duration {
    let mut io = caller.connect().await;
    let mut times = Vec::new();
    for _ in 0..REQUESTS {
        let began = Instant::now();
        exchange(&mut io, REQUEST).await.expect(200);
        times.push(began.elapsed());
    }
    times.sort();
    times[REQUESTS * 99 / 100 - 1]
}

/// What the attacker got of its requests.
#[derive(Default)]
struct Flood {
    over: AtomicBool,
    served: AtomicUsize,
    refused: AtomicUsize,
}

impl Flood {
    async fn ask_on(&self, mut io: TcpStream) {
        while !self.over.load(Ordering::Relaxed) {
            match exchange(&mut io, REQUEST).await.status {
                200 => self.served.fetch_add(1, Ordering::Relaxed),
                429 => {
                    tokio::time::sleep(PAUSE).await;
                    self.refused.fetch_add(1, Ordering::Relaxed)
                }
                status => panic!("status {status}"),
            };
        }
    }
}

/// Opens streams of HTTP/2 and resets each at once, on one connection after the other (CVE-2023-44487).
async fn reset_streams(attacker: &Puppet, over: &AtomicBool) {
    const STREAMS: u32 = 200;
    const CANCEL: [u8; 4] = 8_u32.to_be_bytes();
    let fields = [
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", "slow.example.test"),
        (":path", "/"),
    ];
    let fields = fields.map(|(name, value)| field(name.as_bytes(), value.as_bytes(), false));
    let mut bytes = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &frame(SETTINGS, 0, 0, b"")[..],
    ]
    .concat();
    for stream in (1..2 * STREAMS).step_by(2) {
        bytes.extend(frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            stream,
            &fields.concat(),
        ));
        bytes.extend(frame(RST_STREAM, 0, stream, &CANCEL));
    }
    while !over.load(Ordering::Relaxed) {
        let mut io = attacker.connect().await;
        // The agent ends the connection before it has read all of them.
        let _ = io.write_all(&bytes).await;
        tokio::time::sleep(PAUSE).await;
    }
}

/// The neighbour's p99, and what the attacker got meanwhile.
#[derive(Debug)]
struct Compared {
    alone: Duration,
    beside: Duration,
    served: usize,
    refused: usize,
}

async fn compare(neighbour: &Puppet, attacker: &Puppet) -> Compared {
    let alone = p99(neighbour).await;
    // Heads that never end, streams that are reset, and more requests than the identity may have.
    let mut slow_heads = Vec::new();
    for _ in 0..SLOW_HEADS {
        let mut io = attacker.connect().await;
        let begun = b"GET http://slow.example.test/ HTTP/1.1\r\nX:";
        io.write_all(begun).await.unwrap();
        slow_heads.push(io);
    }
    let flood = Arc::<Flood>::default();
    let mut asking = Vec::new();
    for _ in 0..FLOOD {
        let (flood, io) = (Arc::clone(&flood), attacker.connect().await);
        asking.push(tokio::spawn(async move { flood.ask_on(io).await }));
    }
    let measured = async {
        let beside = p99(neighbour).await;
        flood.over.store(true, Ordering::Relaxed);
        beside
    };
    let (beside, ()) = tokio::join!(measured, reset_streams(attacker, &flood.over));
    for task in asking {
        task.await.unwrap();
    }
    let compared = Compared {
        alone,
        beside,
        served: flood.served.load(Ordering::Relaxed),
        refused: flood.refused.load(Ordering::Relaxed),
    };
    println!("{compared:?}");
    compared
}

#[tokio::test(flavor = "multi_thread")]
async fn t19_a_flood_of_one_identity_at_most_doubles_the_p99_of_another() {
    if !is_root("t19_a_flood_of_one_identity_at_most_doubles_the_p99_of_another") {
        return;
    }
    let mut world = World::servers().await;
    let slow = start_destination().await;
    world.origins.push(("slow".to_owned(), slow));
    world
        .start_agent(
            &format!("{COMMON}{LIMITS}{DESTINATIONS}{DESTINATION}"),
            POLICIES,
        )
        .await;
    let neighbour = Puppet::start(&world.target("proxy"), None).await;
    let attacker = Puppet::start(&world.target("proxy"), Some(NOBODY)).await;
    world.good().await;
    // Where other tests take their share of the machine, the flood also costs the neighbour processor time.
    let most = if are_full() { 2 } else { 4 };
    let mut attempts = 1;
    let mut found = compare(&neighbour, &attacker).await;
    while found.beside > most * found.alone && attempts < ATTEMPTS {
        found = compare(&neighbour, &attacker).await;
        attempts += 1;
    }
    assert!(found.beside <= most * found.alone, "{found:?}");
    assert!(found.served > 0 && found.refused > 0, "{found:?}");
    world.good().await;
    reached("floods", FLOOD + SLOW_HEADS + 1);
}

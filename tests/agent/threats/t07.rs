//! T7: a name that leads to a permitted address when it is looked up, and elsewhere when it is looked up
//! again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::net::{TcpListener, UdpSocket};

use crate::support::counts::reached;
use crate::support::is_root;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::exchange;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

/// Where names are looked up: an address of this process's own, since the port is every resolver's.
fn resolver() -> Ipv4Addr {
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 53, high, low)
}

/// Where the name may lead; the rest of loopback is refused.
const PERMITTED: &str = "127.0.7.1";

/// What the name leads to now.
type Addresses = Arc<Mutex<Vec<IpAddr>>>;

/// A name server that says the same of every name.
async fn start_name_server(addresses: Addresses) {
    let socket = UdpSocket::bind((resolver(), 53)).await.unwrap();
    tokio::spawn(async move {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query).await {
            let answer = answer(&query[..length], &addresses.lock().unwrap());
            socket.send_to(&answer, from).await.unwrap();
        }
    });
}

/// RFC 1035 section 4.
fn answer(query: &[u8], addresses: &[IpAddr]) -> Vec<u8> {
    const AAAA: u8 = 28;
    let name_end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 1;
    let question = &query[12..name_end + 4];
    let kind = question[question.len() - 3];
    let addresses = addresses
        .iter()
        .filter(|address| address.is_ipv6() == (kind == AAAA));
    let mut message = query[..2].to_vec();
    message.extend([
        0x81,
        0x80,
        0,
        1,
        0,
        addresses.clone().count() as u8,
        0,
        0,
        0,
        0,
    ]);
    message.extend(question);
    for address in addresses {
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        message.extend([0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 0, 0]);
        message.push(octets.len() as u8);
        message.extend(octets);
    }
    message
}

#[test]
fn t07_a_name_that_flaps_leads_to_permitted_addresses_only() {
    if !is_root("t07_a_name_that_flaps_leads_to_permitted_addresses_only") {
        return;
    }
    // A mount namespace is its thread's, and of the threads that it starts.
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let nothing: Option<&str> = None;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(nothing, "/", nothing, private, nothing).unwrap();
        let configuration = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&configuration, format!("nameserver {}\n", resolver())).unwrap();
        let path = configuration.path();
        mount(
            Some(path),
            "/etc/resolv.conf",
            nothing,
            MsFlags::MS_BIND,
            nothing,
        )
        .unwrap();
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(a_name_that_flaps());
    })
    .join()
    .unwrap();
}

async fn a_name_that_flaps() {
    let addresses = Addresses::default();
    start_name_server(Arc::clone(&addresses)).await;
    let mut world = World::servers().await;
    // Each request is looked up anew.
    let once = |_: &str| {
        let answer = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
        vec![answer.to_owned(), String::new()]
    };
    let arrived = Arc::new(AtomicUsize::new(0));
    let mut port = 0;
    let elsewhere: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for address in elsewhere {
        let canary = TcpListener::bind((address, port)).await.unwrap();
        port = canary.local_addr().unwrap().port();
        let arrived = Arc::clone(&arrived);
        tokio::spawn(async move {
            while canary.accept().await.is_ok() {
                arrived.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    let permitted: IpAddr = PERMITTED.parse().unwrap();
    let origin = Origin::start_at((permitted, port).into(), None, once).await;
    let flapping = format!(
        "  - {{name: flapping, hosts: [flapping.example.test], scheme: http, ports: [{port}], credentials: [{{name: orders-api}}], allow_addresses: [{PERMITTED}/32]}}\n"
    );
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{flapping}"), POLICIES)
        .await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    let request = format!(
        "GET http://flapping.example.test:{port}/ HTTP/1.1\r\nHost: flapping.example.test:{port}\r\n\r\n"
    );
    world.good().await;
    let hostile: [&[&str]; 8] = [
        &["127.0.0.1"],
        &["::1"],
        &["0.0.0.0"],
        &["::"],
        &["::ffff:127.0.0.1"],
        &["127.0.0.1", "::1"],
        &["64:ff9b::7f00:1", "127.0.0.1"],
        &["127.0.0.1", PERMITTED],
    ];
    let mut sent = 0;
    for led in hostile {
        let led: Vec<IpAddr> = led.iter().map(|one| one.parse().unwrap()).collect();
        for leads_to in [vec![permitted], led, vec![permitted]] {
            let is_permitted = leads_to.contains(&permitted);
            *addresses.lock().unwrap() = leads_to;
            let answer = exchange(&mut caller.connect().await, &request).await;
            assert_eq!(arrived.load(Ordering::SeqCst), 0, "{answer:#?}");
            if is_permitted {
                answer.expect(200);
                sent += 1;
            } else {
                assert_eq!(answer.expect(403).code(), "address_not_allowed");
            }
        }
    }
    assert_eq!(origin.heads().len(), sent);
    world.good().await;
    reached("flapping_names", hostile.len());
}

//! T7: a name that leads to a permitted address when it is looked up, and elsewhere when it is looked up
//! again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::TcpListener;

use crate::support::counts::reached;
use crate::support::name_server::{Addresses, with_name_server};
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::exchange;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

/// Where the name may lead; the rest of loopback is refused.
const PERMITTED: &str = "127.0.7.1";

#[test]
fn t07_a_name_that_flaps_leads_to_permitted_addresses_only() {
    let name = "t07_a_name_that_flaps_leads_to_permitted_addresses_only";
    with_name_server(name, a_name_that_flaps);
}

async fn a_name_that_flaps(addresses: Addresses) {
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

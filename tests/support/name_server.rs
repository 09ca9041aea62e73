//! A name server of the test's own, which whatever the test starts asks.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::net::UdpSocket;

use super::is_root;

/// What every name leads to now.
pub type Addresses = Arc<Mutex<Vec<IpAddr>>>;

/// Runs a test where names are looked up at a name server of its own. Needs root.
pub fn with_name_server<F: Future<Output = ()>>(
    name: &str,
    test: impl FnOnce(Addresses) -> F + Send + 'static,
) {
    if !is_root(name) {
        return;
    }
    // A mount namespace is its thread's, and of the threads that it starts.
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let nothing: Option<&str> = None;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(nothing, "/", nothing, private, nothing).unwrap();
        let configuration = tempfile::NamedTempFile::new().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        let addresses = Addresses::default();
        let resolver = runtime.block_on(start_name_server(Arc::clone(&addresses)));
        let options = "options timeout:30";
        std::fs::write(
            &configuration,
            format!("nameserver {resolver}\n{options}\n"),
        )
        .unwrap();
        let path = configuration.path();
        mount(
            Some(path),
            "/etc/resolv.conf",
            nothing,
            MsFlags::MS_BIND,
            nothing,
        )
        .unwrap();
        runtime.block_on(test(addresses));
        // Without waiting for lookups that have no answer.
        runtime.shutdown_background();
    })
    .join()
    .unwrap();
}

/// A name server that says the same of every name, and of those with `dead` in them nothing.
async fn start_name_server(addresses: Addresses) -> Ipv4Addr {
    let (address, socket) = bind().await;
    tokio::spawn(async move {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query).await {
            if query[..length].windows(4).any(|part| part == b"dead") {
                continue;
            }
            let answer = answer(&query[..length], &addresses.lock().unwrap());
            socket.send_to(&answer, from).await.unwrap();
        }
    });
    address
}

/// At an address that no other test has, since the port is every resolver's.
async fn bind() -> (Ipv4Addr, UdpSocket) {
    let [.., high, low] = std::process::id().to_be_bytes();
    for network in 53..=63 {
        let address = Ipv4Addr::new(127, network, high, low);
        if let Ok(socket) = UdpSocket::bind((address, 53)).await {
            return (address, socket);
        }
    }
    panic!("no address is free for a name server");
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

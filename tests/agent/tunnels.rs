//! What may be said inside a tunnel that is looked into, and how long it may wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

/// More than a busy machine takes beyond the limit.
const SOON: Duration = Duration::from_secs(25);
/// How long a client may take to say what it speaks.
const SNIFF: Duration = Duration::from_secs(5);

const GET: &str = "GET /v1/orders HTTP/1.1\r\nHost: orders.example.test\r\n\r\n";

/// TLS for `name` inside a tunnel to orders.example.test.
pub(crate) async fn tls_for(
    world: &World,
    caller: &Puppet,
    name: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut io = caller.connect().await;
    open_tunnel(&mut io, "orders.example.test:443")
        .await
        .expect(200);
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(world.path("ca.pem")).unwrap())
        .unwrap();
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from(name.to_owned()).unwrap(), io)
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_for_another_name_inside_a_tunnel_gets_no_certificate() {
    let mut world = World::servers().await;
    let other = "  - {name: other, hosts: [origin.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: \"{api}\"}\n";
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{other}"), POLICIES)
        .await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;
    let before = world.api.seen().len();
    let mut refused = 0;
    // Of another destination, of none, and one below the tunnel's own.
    for name in [
        "origin.example.test",
        "elsewhere.example.test",
        "sub.orders.example.test",
    ] {
        let error = tls_for(&world, &caller, name).await.unwrap_err();
        // Not by us for a certificate that does not verify: the agent showed none.
        let shown = error
            .get_ref()
            .and_then(|error| error.downcast_ref::<rustls::Error>());
        assert!(
            !matches!(shown, Some(rustls::Error::InvalidCertificate(_))),
            "{name}: {error:?}"
        );
        refused += 1;
    }
    assert_eq!(world.api.seen().len(), before);
    // However it spells its own.
    for name in ["orders.example.test", "ORDERS.example.test"] {
        let mut io = tls_for(&world, &caller, name).await.unwrap();
        exchange(&mut io, GET).await.expect(200);
    }
    world.good().await;
    reached("other_names", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_says_nothing_is_closed_where_it_is_looked_into() {
    let mut world = World::servers().await;
    // It speaks first, as SMTP does.
    let origin = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    world
        .origins
        .push(("first".to_owned(), origin.local_addr().unwrap()));
    tokio::spawn(async move {
        let (mut io, _) = origin.accept().await.unwrap();
        tokio::time::sleep(SNIFF + Duration::from_secs(1)).await;
        io.write_all(b"220 ready\r\n").await.unwrap();
    });
    let unused = Origin::start(None, |_| Vec::new()).await;
    world.origins.push(("unused".to_owned(), unused.address));
    let destinations = r#"
  - {name: unused, hosts: [unused.example.test], credentials: [{name: orders-api}], ca_file: servers.pem, connect_to: "{unused}"}
  - {name: blind, hosts: [blind.example.test], ports: [25], connect_to: "{first}"}
"#;
    let tunnels = "@id(\"tunnels\")\npermit (principal, action == Action::\"connect\", resource == Destination::\"blind\") when { principal has unix };\n";
    world
        .start_agent(
            &format!("{COMMON}{DESTINATIONS}{destinations}"),
            &format!("{POLICIES}{tunnels}"),
        )
        .await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;
    let silent = ["", "PRI * HTTP/2.0\r\n"].map(|said| {
        let caller = &caller;
        async move {
            let mut io = caller.connect().await;
            let began = Instant::now();
            open_tunnel(&mut io, "unused.example.test:443")
                .await
                .expect(200);
            io.write_all(said.as_bytes()).await.unwrap();
            let closed = tokio::time::timeout(SOON, io.read(&mut [0])).await;
            assert_eq!(
                closed.expect("the tunnel is closed").unwrap_or(0),
                0,
                "{said}"
            );
            began.elapsed()
        }
    });
    let blind = async {
        let mut io = caller.connect().await;
        open_tunnel(&mut io, "blind.example.test:25")
            .await
            .expect(200);
        let mut greeting = [0; 11];
        io.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"220 ready\r\n");
    };
    let (took, ()) = tokio::join!(join_all(silent), blind);
    for took in &took {
        assert!(*took >= SNIFF, "{took:?}");
    }
    assert_eq!(unused.connections(), 0);
    world.good().await;
    reached("sniffed_in_vain", took.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blind_tunnel_ends_with_the_first_of_its_permits() {
    let mut world = World::servers().await;
    let origin = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    world
        .origins
        .push(("origin".to_owned(), origin.local_addr().unwrap()));
    let destinations = r#"
  - {name: one, hosts: [blind.example.test, one.example.test], ports: [25], connect_to: "{origin}"}
  - {name: other, hosts: [blind.example.test, other.example.test], ports: [25], connect_to: "{origin}"}
"#;
    let end = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(12);
    let permit = |name: &str, until: &str| {
        format!(
            "@id(\"{name}\") {until}\npermit (principal, action == Action::\"connect\", resource == Destination::\"{name}\") when {{ principal has unix }};\n"
        )
    };
    let policies = [
        permit("one", &format!("@expires(\"{end:.0}\")")),
        permit("other", ""),
    ];
    world
        .start_agent(
            &format!("{COMMON}{DESTINATIONS}{destinations}"),
            &format!("{POLICIES}{}", policies.concat()),
        )
        .await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    let mut io = caller.connect().await;
    open_tunnel(&mut io, "blind.example.test:25")
        .await
        .expect(200);
    let _served = origin.accept().await.unwrap();
    let closed = tokio::time::timeout(SOON, io.read(&mut [0])).await;
    assert_eq!(closed.expect("the tunnel is closed").unwrap_or(0), 0);
    assert!(jiff::Timestamp::now() >= end - jiff::SignedDuration::from_secs(1));
}

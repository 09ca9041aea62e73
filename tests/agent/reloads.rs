//! What a reload binds, keeps and closes; and what must hold where several destinations share a place.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use countersign::dev::OidcIssuer;
use countersign::policy::{Revocation, Revoked};
use tokio::net::UnixStream;

use crate::support::counts::reached;
use crate::support::eventually;
use crate::support::gate::Gate;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{exchange, open_tunnel};
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

const TO_GATEWAY: &str = "GET /v1/orders HTTP/1.1\r\nHost: gateway\r\n\r\n";
const PLAIN: &str =
    "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_moves_listeners_and_changes_who_may_connect() {
    let world = World::start().await;
    let configuration = world.fill(&format!("{COMMON}{DESTINATIONS}"));
    let path = |name: &str| world.path(name);
    let mut io = UnixStream::connect(path("gateway.sock")).await.unwrap();
    exchange(&mut io, TO_GATEWAY).await.expect(200);

    let moved = configuration
        .replace("gateway.sock", "moved.sock")
        .replacen("mode: \"0666\"", "mode: \"0600\"", 1);
    world.write("countersign.yaml", &moved);
    world.app().reload().await.unwrap();

    let mut io = UnixStream::connect(path("moved.sock")).await.unwrap();
    exchange(&mut io, TO_GATEWAY).await.expect(200);
    // Its acceptor ends a moment later, and its socket with it.
    eventually(Duration::from_secs(30), || async {
        (!path("gateway.sock").exists()).then_some(())
    })
    .await;
    let mode = std::fs::metadata(path("proxy.sock")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let plain = "http://plain.example.test/v1/orders";
    world.curl(&[plain]).await.expect(200);

    // An address that somebody else has: the reload fails, and takes nothing away.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let conflict = moved.replace(
        "listeners:\n",
        &format!(
            "listeners:\n  - {{name: another, type: forward_proxy, bind: \"{}\"}}\n",
            taken.local_addr().unwrap()
        ),
    );
    world.write("countersign.yaml", &conflict);
    world.app().reload().await.unwrap_err();
    let mut io = UnixStream::connect(path("moved.sock")).await.unwrap();
    exchange(&mut io, TO_GATEWAY).await.expect(200);
    reached("moved", 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_keeps_the_token_that_was_presented_to_it() {
    let mut world = World::servers().await;
    let origin = Origin::start(None, |_| {
        vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()]
    })
    .await;
    world.origins.push(("mirror".to_owned(), origin.address));
    let common = COMMON.replace(
        "attestors:\n",
        "  - {name: mirror, type: gateway, bind: \"127.0.0.1:0\", destination: mirror}\nattestors:\n",
    );
    let mirror = r#"
  - {name: mirror, hosts: [mirror.example.test], scheme: http, mode: report_only, credentials: [{name: billing-api}], connect_to: "{mirror}"}
"#;
    world
        .start_agent(&format!("{common}{DESTINATIONS}{mirror}"), POLICIES)
        .await;
    let caller = Puppet::start(&world.target("mirror"), None).await;
    let claims = serde_json::json!({"repository": "acme/orders"});
    let token = world
        .issuer
        .mint("job", "countersign", Duration::from_secs(300), &claims)
        .unwrap();
    let mut io = caller.connect().await;
    for (authorization, arrives) in [
        ("Bearer of-the-workload".to_owned(), true),
        (format!("Bearer {token}"), false),
        ("Bearer of-the-workload".to_owned(), true),
    ] {
        let request =
            format!("GET /v1 HTTP/1.1\r\nHost: gateway\r\nAuthorization: {authorization}\r\n\r\n");
        exchange(&mut io, &request).await.expect(200);
        let head = origin.heads().pop().unwrap();
        assert_eq!(head.contains(&authorization), arrives, "{head}");
        assert_eq!(
            head.to_ascii_lowercase().contains("authorization"),
            arrives,
            "{head}"
        );
    }
    reached("kept_tokens", 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_keeps_a_token_that_it_cannot_verify() {
    let mut world = World::servers().await;
    let origin = Origin::start(None, |_| {
        vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()]
    })
    .await;
    world.origins.push(("mirror".to_owned(), origin.address));
    // It speaks no TLS: the issuer's keys cannot be had.
    world.origins.push(("issuer".to_owned(), origin.address));
    let common = COMMON.replace(
        "attestors:\n",
        "  - {name: mirror, type: gateway, bind: \"127.0.0.1:0\", destination: mirror}\nattestors:\n",
    );
    let mirror = "  - {name: mirror, hosts: [mirror.example.test], scheme: http, connect_to: \"{mirror}\"}\n";
    let policies = r#"
@id("mirrors")
permit (principal, action == Action::"connect", resource == Destination::"mirror")
when { principal has unix };
"#;
    world
        .start_agent(&format!("{common}{DESTINATIONS}{mirror}"), policies)
        .await;
    let caller = Puppet::start(&world.target("mirror"), None).await;
    let mint = |issuer: &OidcIssuer| {
        let claims = serde_json::json!({"repository": "acme/orders"});
        let lifetime = Duration::from_secs(300);
        let token = issuer.mint("job", "countersign", lifetime, &claims);
        format!("Bearer {}", token.unwrap())
    };
    let certificate = world.authority.issue(&["other.example.test"]).unwrap();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let other = OidcIssuer::start("https://other.example.test", any, &certificate)
        .await
        .unwrap();
    let headed = |token: String| {
        let (_, rest) = token.split_once('.').unwrap();
        let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"ES512","typ":"at+jwt"}"#);
        format!("Bearer {header}.{rest}")
    };
    let long = |token: String| token + &"A".repeat(16 * 1024);
    for (authorization, arrives) in [
        (mint(&other), true),
        (mint(&world.issuer), false),
        (headed(mint(&other)), true),
        (headed(mint(&world.issuer)), false),
        (long(mint(&other)), true),
        (long(mint(&world.issuer)), false),
    ] {
        let request =
            format!("GET /v1 HTTP/1.1\r\nHost: gateway\r\nAuthorization: {authorization}\r\n\r\n");
        exchange(&mut caller.connect().await, &request)
            .await
            .expect(200);
        let heads = origin.heads();
        let head = heads.iter().rfind(|head| head.starts_with("GET /v1 "));
        assert_eq!(head.unwrap().contains(&authorization), arrives, "{head:?}");
    }
    reached("kept_unverified", 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blind_tunnel_needs_permission_for_all_that_it_may_reach() {
    let mut world = World::servers().await;
    let destinations = r#"
  - {name: open, hosts: [open.example.test], ports: [7], connect_to: "{plain}"}
  - {name: first, hosts: [shared.example.test], ports: [7], connect_to: "{plain}"}
  - {name: second, hosts: [shared.example.test], ports: [7], scheme: http, connect_to: "{plain}"}
  - {name: partial, hosts: [partial.example.test], ports: [7], paths: ["/public/**"], connect_to: "{plain}"}
"#;
    let policies = r#"
@id("tunnels")
permit (principal, action == Action::"connect", resource)
when { principal has unix && resource != Destination::"second" };
"#;
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destinations}"), policies)
        .await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    let mut refused = 0;
    for (host, status, code) in [
        ("open", 200, ""),
        ("shared", 403, "policy_denied"),
        ("partial", 403, "destination_not_configured"),
        ("open", 200, ""),
    ] {
        let mut io = caller.connect().await;
        let before = world.plain_api.seen().len();
        let answer = open_tunnel(&mut io, &format!("{host}.example.test:7"))
            .await
            .expect(status);
        if status != 200 {
            let status = answer.headers("proxy-status").concat();
            assert!(status.contains(code), "{host}: {status}");
            refused += 1;
        }
        assert_eq!(world.plain_api.seen().len(), before);
    }
    reached("tunnels_refused", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_revoked_while_a_reload_is_under_way_stays_revoked() {
    let world = World::start().await;
    world.good().await;
    let path = world.path("countersign.yaml");
    let configuration = std::fs::read_to_string(&path).unwrap();
    let mut held = 0;
    // The reload reads the configuration from a pipe, and waits there until we write.
    let pipe = world.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::rename(&pipe, &path).unwrap();
    let app = std::sync::Arc::clone(world.app());
    let reload = tokio::spawn(async move { app.reload().await });
    let mut writer = tokio::task::spawn_blocking({
        let path = path.clone();
        // Returns once there is a reader.
        move || std::fs::File::options().write(true).open(path).unwrap()
    })
    .await
    .unwrap();
    world.write("whole.yaml", &configuration);
    std::fs::rename(world.path("whole.yaml"), &path).unwrap();
    let revocation = Revocation {
        id: "r1".to_owned(),
        what: Revoked::Credential("orders-api".to_owned()),
        until: None,
    };
    world
        .app()
        .replace_revocations(|revocations| Some(revocations.with(revocation.clone())));
    assert!(!reload.is_finished());
    std::io::Write::write_all(&mut writer, configuration.as_bytes()).unwrap();
    drop(writer);
    reload.await.unwrap().unwrap();

    let mut io = world.connect().await;
    let answer = exchange(&mut io, PLAIN).await.expect(403);
    assert_eq!(answer.code(), "revoked");
    held += 1;
    world
        .app()
        .replace_revocations(|revocations| revocations.without("r1"));
    world.good().await;
    reached("revoked_meanwhile", held);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_while_its_credential_is_renamed_is_decided_again() {
    let mut world = World::servers().await;
    let gate = Gate::before(world.issuer.address()).await;
    world.origins.push(("issuer".to_owned(), gate.address));
    let common = COMMON.replace(
        "listeners:\n",
        "listeners:\n  - {name: api, type: workload_api, bind: \"unix:{directory}/api.sock\"}\n",
    );
    let configuration = format!("{common}{DESTINATIONS}");
    let all = "@id(\"all\") permit (principal, action, resource) when { principal has unix };";
    world.start_agent(&configuration, all).await;
    world.good().await;
    let claims = serde_json::json!({"repository": "acme/orders"});
    let lifetime = Duration::from_secs(300);
    let token = world.issuer.mint("job", "countersign", lifetime, &claims);
    let token = token.unwrap();
    let send = |listener: &str, request: String| {
        let path = world.target(listener);
        tokio::spawn(async move {
            let mut io = UnixStream::connect(path).await.unwrap();
            exchange(&mut io, &request).await
        })
    };
    // To know whose they are, the issuer's keys are fetched.
    let host = "plain.example.test";
    let injected = format!(
        "GET http://{host}/v1/orders HTTP/1.1\r\nHost: {host}\r\nProxy-Authorization: Bearer {token}\r\n\r\n"
    );
    let ask = r#"{"credential": "orders-api"}"#;
    let length = ask.len();
    let issued = format!(
        "POST /v1/token HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {token}\r\nContent-Length: {length}\r\n\r\n{ask}"
    );
    let renamed = configuration.replace("orders-api", "orders-v2");
    world.write("countersign.yaml", &world.fill(&renamed));
    let (injected, issued) = (send("local", injected), send("api", issued));
    gate.is_waited_at().await;
    world.app().reload().await.unwrap();
    gate.open();

    injected.await.unwrap().expect(200);
    // What is asked for by its name is not there any more.
    let answer = issued.await.unwrap();
    assert_eq!(answer.code(), "token_request_invalid", "{answer:#?}");
    world.good().await;
    reached("renamed_meanwhile", 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_says_anew_who_may_open_a_socket() {
    let mut world = World::servers().await;
    let configuration = format!("{COMMON}{DESTINATIONS}");
    world.start_agent(&configuration, POLICIES).await;
    let mode = |world: &World| {
        let file = std::fs::metadata(world.path("proxy.sock")).unwrap();
        PermissionsExt::mode(&file.permissions()) & 0o777
    };
    let local = "name: local, type: forward_proxy, bind: \"unix:{directory}/proxy.sock\", access: ";
    let was = format!("{local}{{mode: \"0666\"}}");
    assert_eq!(mode(&world), 0o666);
    // Under its name, and under another.
    for (name, access) in [("local", 0o660), ("workloads", 0o600)] {
        let is = format!("{local}{{mode: \"{access:04o}\"}}")
            .replace("name: local", &format!("name: {name}"));
        world.write(
            "countersign.yaml",
            &world.fill(&configuration.replace(&was, &is)),
        );
        world.app().reload().await.unwrap();
        assert_eq!(mode(&world), access, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_outlives_the_client_that_asked_for_it() {
    let mut world = World::servers().await;
    let common = format!("{COMMON}admin: {{socket: admin.sock}}\n");
    world
        .start_agent(&format!("{common}{DESTINATIONS}"), POLICIES)
        .await;
    let path = world.path("countersign.yaml");
    let configuration = std::fs::read_to_string(&path).unwrap();
    let pipe = world.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::rename(&pipe, &path).unwrap();
    let mut client = UnixStream::connect(world.path("admin.sock")).await.unwrap();
    let request = "POST /v1/reload HTTP/1.1\r\nHost: agent\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut client, request.as_bytes())
        .await
        .unwrap();
    // Returns once the reload reads.
    let to_open = path.clone();
    let opening = move || std::fs::File::options().write(true).open(to_open).unwrap();
    let mut writer = tokio::task::spawn_blocking(opening).await.unwrap();
    drop(client);
    world.write("whole.yaml", &configuration);
    std::fs::rename(world.path("whole.yaml"), &path).unwrap();
    // The agent may notice meanwhile that its client has gone.
    tokio::time::sleep(Duration::from_millis(500)).await;
    std::io::Write::write_all(&mut writer, configuration.as_bytes()).unwrap();
    drop(writer);
    eventually(Duration::from_secs(30), || async {
        let records = world.audit().await;
        let mut events = records.iter().map(|record| &record["event"]);
        events.any(|event| event == "reload").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_that_hangs_fails_in_time_and_lets_the_next_succeed() {
    // What is read before anything is bound anew, and what is read after.
    for hangs in ["countersign.yaml", "servers.pem"] {
        let mut world = World::servers().await;
        world.options.reload_limit = Duration::from_secs(3);
        world
            .start_agent(&format!("{COMMON}{DESTINATIONS}"), POLICIES)
            .await;
        let (path, whole) = (world.path(hangs), world.path("whole"));
        std::fs::rename(&path, &whole).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // Who reads it waits: nothing is ever written.
        let mut open = std::fs::File::options();
        let _writer = open.read(true).write(true).open(&path).unwrap();
        let problems = world.app().reload().await.unwrap_err();
        let codes: Vec<_> = problems.iter().map(|problem| problem.code).collect();
        assert_eq!(codes, ["reload_timeout"], "{hangs}");
        let records = world.audit().await;
        assert_eq!(records.last().unwrap()["event"], "reload_failed", "{hangs}");
        std::fs::rename(&whole, &path).unwrap();
        eventually(Duration::from_secs(30), || async {
            world.app().reload().await.ok()
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reloads_that_hang_hold_a_few_threads_and_no_more() {
    let mut world = World::servers().await;
    world.options.reload_limit = Duration::from_secs(1);
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}"), POLICIES)
        .await;
    let (path, whole) = (world.path("countersign.yaml"), world.path("whole"));
    std::fs::rename(&path, &whole).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut hung = 0;
    let refused = loop {
        let problems = world.app().reload().await.unwrap_err();
        let problem = problems.iter().next().unwrap().clone();
        assert_eq!(problem.code, "reload_timeout");
        if problem.message.contains("reading still") {
            break hung;
        }
        hung += 1;
    };
    assert_eq!(refused, 4);
    // Those that wait read nothing now, and end.
    drop(std::fs::File::options().write(true).open(&path).unwrap());
    std::fs::rename(&whole, &path).unwrap();
    eventually(Duration::from_secs(30), || async {
        world.app().reload().await.ok()
    })
    .await;
    world.good().await;
}

/// An authority's certificate and key in PEM.
fn authority(name: &str) -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = parameters.self_signed(&key).unwrap();
    (certificate.pem(), key.serialize_pem())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_reads_the_files_of_the_interception_authority_again() {
    let mut world = World::servers().await;
    let replace = |world: &World, (certificate, key): &(String, String)| {
        world.write("own.pem", certificate);
        world.write("own.key", key);
        std::fs::set_permissions(world.path("own.key"), PermissionsExt::from_mode(0o600)).unwrap();
    };
    let first = authority("first");
    let second = authority("second");
    replace(&world, &first);
    let common = COMMON.replace(
        "{source: generated, state_directory: ca}",
        "{source: files, certificate_file: own.pem, key_file: own.key}",
    );
    world
        .start_agent(&format!("{common}{DESTINATIONS}"), POLICIES)
        .await;
    world.good().await;
    let in_force = || {
        let snapshot = world.app().agent().snapshot.load_full();
        snapshot.interception.clone().unwrap()
    };
    // Files that hold what they held: the leaves that were minted stay.
    let before = in_force();
    world.app().reload().await.unwrap();
    assert!(std::sync::Arc::ptr_eq(&before, &in_force()));

    replace(&world, &second);
    world.app().reload().await.unwrap();
    // What clients load was written anew, and `good` loads it.
    let published = std::fs::read_to_string(world.path("ca.pem")).unwrap();
    assert_eq!(published.trim(), second.0.trim());
    world.good().await;
    // Whoever trusts the first only is not served under the second.
    world.write("ca.pem", &first.0);
    let answer = world.curl(&["https://orders.example.test/v1/orders"]).await;
    assert_eq!(answer.status, 0, "{answer:#?}");
    world.write("ca.pem", &second.0);
    world.good().await;
    reached("authorities_read", 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_reads_trusted_roots_again() {
    let mut world = World::servers().await;
    let right = world.authority.pem().to_owned();
    let (wrong, _) = authority("another");
    // Each of the three kinds of server has a file of its own.
    let text = format!("{COMMON}{DESTINATIONS}");
    let (before, attestors) = text.split_once("attestors:").unwrap();
    let (attestors, rest) = attestors.split_once("credentials:").unwrap();
    let (credentials, destinations) = rest.split_once("destinations:").unwrap();
    let configuration = format!(
        "{before}attestors:{}credentials:{}destinations:{}",
        attestors.replace("servers.pem", "issuer.pem"),
        credentials.replace("servers.pem", "auth.pem"),
        destinations.replace("servers.pem", "api.pem"),
    );
    for file in ["issuer.pem", "auth.pem", "api.pem"] {
        world.write(file, &right);
    }
    world
        .start_agent(&configuration, &format!("{POLICIES}{OF_JOBS}"))
        .await;
    let claims = serde_json::json!({"repository": "acme/orders"});
    let mut proxy = world.connect().await;
    let mut read = 0;
    world.good().await;

    // A destination: connections that stand were made under the roots of then.
    world.write("api.pem", &wrong);
    world.app().reload().await.unwrap();
    let seen = world.api.seen().len();
    let answer = world.curl(&["https://orders.example.test/v1/orders"]).await;
    assert_eq!(answer.code(), "upstream_tls", "{answer:#?}");
    assert_eq!(world.api.seen().len(), seen);
    world.write("api.pem", &right);
    world.app().reload().await.unwrap();
    world.good().await;
    read += 1;

    // An issuer: its keys were not fetched yet.
    world.write("issuer.pem", &wrong);
    world.app().reload().await.unwrap();
    for (status, code) in [(503, "attestation_unavailable"), (200, "")] {
        let token = world
            .issuer
            .mint("job", "countersign", Duration::from_secs(300), &claims)
            .unwrap();
        let request = format!(
            "DELETE http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\nProxy-Authorization: Bearer {token}\r\n\r\n"
        );
        let answer = exchange(&mut proxy, &request).await.expect(status);
        assert_eq!(answer.code(), code, "{answer:#?}");
        world.write("issuer.pem", &right);
        world.app().reload().await.unwrap();
    }
    read += 1;
    world.good().await;
    reached("roots_read", read);
}

/// What only a job of the issuer's may do.
const OF_JOBS: &str = r#"
@id("jobs")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has ci.repository && principal.ci.repository == "acme/orders" };
"#;

//! Each request goes out with its own workload's token, whoever else is on the node, and whatever is
//! done to a connection.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::support::client::Client;
use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::{
    ARGUMENTS, Departure, Puppet, connect_send_exit, copy_program, depart, program,
};
use crate::support::raw::exchange;
use crate::support::world::{COMMON, World};
use crate::support::{NOBODY, has_user_namespaces, is_root, unprivileged};

const CONNECTIONS: usize = 64;
const REQUESTS: usize = 10_000;

const BOTH: &str = r#"
destinations:
  - name: orders
    hosts: [orders.example.test]
    paths: ["/v1/**"]
    credentials: [{name: orders-api}, {name: billing-api}]
    ca_file: servers.pem
    connect_to: "{api}"
  - name: plain
    hosts: [plain.example.test]
    scheme: http
    paths: ["/v1/**"]
    credentials: [{name: orders-api}, {name: billing-api}]
    connect_to: "{plain}"
"#;

const ONE_EACH: &str = r#"
@id("root-orders")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == {uid} };
@id("nobody-bills")
permit (principal, action == Action::"inject", resource == Credential::"billing-api")
when { principal has unix && principal.unix.uid == 65534 };
"#;

/// Who sends, and whose token must arrive.
#[derive(Clone, Copy)]
struct Identity {
    uid: Option<u32>,
    client_id: &'static str,
}

#[tokio::test(flavor = "multi_thread")]
async fn each_workload_gets_its_own_token_on_interleaved_connections() {
    if !is_root("each_workload_gets_its_own_token_on_interleaved_connections") {
        return;
    }
    let mut world = World::servers().await;
    world
        .start_agent(&format!("{COMMON}{BOTH}"), ONE_EACH)
        .await;
    world.good().await;
    let root = world.path("ca.pem");
    let proxy = world.address("proxy").to_string();
    let identities = [
        Identity {
            uid: None,
            client_id: "orders-agent",
        },
        Identity {
            uid: Some(NOBODY),
            client_id: "billing-agent",
        },
    ];
    let mut puppets = Vec::new();
    for identity in &identities {
        puppets.push(Puppet::start(&proxy, identity.uid).await);
    }
    let mut tasks = Vec::new();
    for connection in 0..CONNECTIONS {
        let identity = identities[connection % 2];
        let puppet = &puppets[connection % 2];
        let (mut client, uri, host) = match connection / 2 % 3 {
            0 => (
                Client::http1(puppet).await,
                "http://plain.example.test/v1/orders",
                "plain.example.test",
            ),
            1 => (
                Client::tls(puppet, "orders.example.test", &root, false).await,
                "/v1/orders",
                "orders.example.test",
            ),
            _ => (
                Client::tls(puppet, "orders.example.test", &root, true).await,
                "https://orders.example.test/v1/orders",
                "orders.example.test",
            ),
        };
        let share = REQUESTS / CONNECTIONS + usize::from(connection < REQUESTS % CONNECTIONS);
        tasks.push(tokio::spawn(async move {
            for _ in 0..share {
                let (status, body) = client.get(uri, host).await.unwrap();
                assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
                let body: Value = serde_json::from_slice(&body).unwrap();
                assert_eq!(body["verified"]["sub"], identity.client_id);
            }
            share
        }));
    }
    let mut sent = 0;
    for task in tasks {
        sent += task.await.unwrap();
    }
    // What the origins saw: as many of each identity as were sent, and nothing that was refused.
    let seen = [world.api.seen(), world.plain_api.seen()].concat();
    let mut by_subject = BTreeMap::new();
    for seen in &seen {
        let subject = seen.token.as_ref().unwrap()["sub"].as_str().unwrap();
        *by_subject.entry(subject.to_owned()).or_insert(0_usize) += 1;
    }
    assert_eq!(by_subject["orders-agent"], sent / 2 + 1);
    assert_eq!(by_subject["billing-agent"], sent / 2);
    assert_eq!(world.authorization_server.state().token_requests(), 2);
    assert_eq!(world.audited_requests().await.len(), sent + 1);
    world.good().await;
    reached("interleaved", sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_is_gone_is_never_taken_for_root() {
    if !is_root("a_caller_that_is_gone_is_never_taken_for_root") {
        return;
    }
    let mut world = World::servers().await;
    world
        .start_agent(&format!("{COMMON}{BOTH}"), ONE_EACH)
        .await;
    world.good().await;
    world.api.forget();
    let request =
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let proxy = world.address("proxy").to_string();
    let mut attempts = 0;
    for _ in 0..100 {
        connect_send_exit(&proxy, request, 100, Some(NOBODY)).await;
        attempts += 100;
    }
    // Until the agent has seen to them all.
    crate::support::eventually(Duration::from_secs(60), || async {
        let open = world.app().agent().metrics.encode();
        open.lines()
            .any(|line| {
                line.starts_with("countersign_open_connections{")
                    && line.contains("\"proxy\"")
                    && line.ends_with(" 0")
            })
            .then_some(())
    })
    .await;
    for seen in world.plain_api.seen() {
        let subject = seen.token.as_ref().unwrap()["sub"]
            .as_str()
            .unwrap()
            .to_owned();
        assert_eq!(subject, "billing-agent", "{seen:#?}");
    }
    for line in world.audit().await {
        if line["kind"] == "attested" && line["listener"] == "proxy" {
            let uid = &line["attributes"]["unix"]["uid"];
            let executable = line["attributes"]["unix"]["executable"]
                .as_str()
                .unwrap_or_default();
            assert!(
                *uid == NOBODY || uid.is_null() || executable.contains("curl"),
                "{line}"
            );
        }
    }
    world.good().await;
    reached("callers_gone", attempts);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_request_on_a_departed_workloads_connection_is_refused() {
    let world = World::start().await;
    world.good().await;
    let to_proxy =
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let to_gateway = "GET /v1/orders HTTP/1.1\r\nHost: gateway\r\n\r\n";
    let tunnel = "CONNECT plain.example.test:80 HTTP/1.1\r\nHost: plain.example.test:80\r\n\r\n";
    let in_tunnel = "GET /v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let mut refused = 0;
    for departure in [Departure::Exec, Departure::Exit] {
        for (listener, steps, second) in [
            ("proxy", vec![(to_proxy, "")], to_proxy),
            ("local", vec![(to_proxy, "")], to_proxy),
            ("gateway", vec![(to_gateway, "")], to_gateway),
            ("local-gateway", vec![(to_gateway, "")], to_gateway),
            ("proxy", vec![(tunnel, ""), (in_tunnel, "")], in_tunnel),
            ("local", vec![(tunnel, ""), (in_tunnel, "")], in_tunnel),
        ] {
            let seen = || world.plain_api.seen().len() + world.api.seen().len();
            let before = seen();
            let target = world.target(listener);
            let silence = Duration::from_secs(30);
            let departed =
                depart(departure, &target, unprivileged(), &steps, second, silence).await;
            assert!(departed.before.contains("\"verified\""), "{departed:#?}");
            let after = &departed.after;
            assert!(
                after.contains("attestation_ended") || after.is_empty(),
                "{departed:#?}"
            );
            assert!(departed.closed.is_some(), "{departed:#?}");
            assert_eq!(seen(), before + 1, "{departed:#?}");
            refused += 1;
        }
    }
    world.good().await;
    reached("departed", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_mounted_over_a_permitted_one_is_not_taken_for_it() {
    let test = "a_file_mounted_over_a_permitted_one_is_not_taken_for_it";
    if !is_root(test) || !has_user_namespaces(test) {
        return;
    }
    let mut world = World::servers().await;
    let permitted = world.path("permitted");
    copy_program(program(), &permitted, "");
    // Another program, which happens to do the same.
    let other = world.path("other");
    copy_program(program(), &other, "other");
    let (permitted, other) = (permitted.display().to_string(), other.display().to_string());
    let policies = format!(
        r#"
@id("root")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when {{ principal has unix && principal.unix.uid == {{uid}} }};
@id("permitted")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when {{ principal has unix && principal.unix.uid == {NOBODY} && principal.unix has executable && principal.unix.executable == "{permitted}" }};
"#
    );
    let destinations = crate::support::world::DESTINATIONS;
    world
        .start_agent(&format!("{COMMON}{destinations}"), &policies)
        .await;
    world.good().await;
    let arguments = ARGUMENTS.join(" ");
    let honest = format!("exec {permitted} {arguments}");
    let mounts = format!(
        "exec unshare -Urm sh -c 'mount --bind {other} {permitted} && exec {permitted} {arguments}'"
    );
    let request =
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let mut refused = 0;
    for listener in ["proxy", "local"] {
        for (script, status) in [(&honest, 200), (&mounts, 403), (&honest, 200)] {
            let before = world.plain_api.seen().len();
            let mut command = tokio::process::Command::new("/bin/sh");
            command.args(["-c", script]);
            let puppet = Puppet::start_by(command, &world.target(listener), Some(NOBODY)).await;
            let shown = std::fs::read_link(format!("/proc/{}/exe", puppet.pid())).unwrap();
            assert_eq!(shown.display().to_string(), permitted, "{script}");
            let answer = exchange(&mut puppet.connect().await, request).await;
            let answer = answer.expect(status);
            let arrived = world.plain_api.seen().len() - before;
            assert_eq!(arrived, usize::from(status == 200), "{script}");
            if status == 403 {
                assert_eq!(answer.code(), "policy_denied");
                refused += 1;
            }
        }
    }
    world.good().await;
    reached("mounted_over", refused);
}

const NEEDS_TOKEN: &str = r#"
@id("ci-orders")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has ci.repository && principal.ci.repository == "acme/orders" };
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_presented_token_is_evidence_of_its_own_request_only() {
    let mut world = World::servers().await;
    let destinations = crate::support::world::DESTINATIONS;
    world
        .start_agent(&format!("{COMMON}{destinations}"), NEEDS_TOKEN)
        .await;
    let mint = |audience: &str, repository: &str, lifetime| {
        world
            .issuer
            .mint(
                "job",
                audience,
                Duration::from_secs(lifetime),
                &serde_json::json!({"repository": repository}),
            )
            .unwrap()
    };
    let token = mint("countersign", "acme/orders", 300);
    let proxy = Puppet::start(&world.target("proxy"), unprivileged()).await;
    let gateway = Puppet::start(&world.target("gateway"), unprivileged()).await;
    let get = |header: &str| {
        format!(
            "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n{header}\r\n"
        )
    };
    let basic = {
        use base64::Engine;
        let pair = base64::engine::general_purpose::STANDARD.encode(format!("token:{token}"));
        format!("Proxy-Authorization: Basic {pair}\r\n")
    };
    let bearer = format!("Proxy-Authorization: Bearer {token}\r\n");
    let mut refused = 0;
    for presented in [&bearer, &basic] {
        let mut io = proxy.connect().await;
        exchange(&mut io, &get(presented)).await.expect(200);
        let before = world.plain_api.seen().len();
        for missing_or_wrong in [
            String::new(),
            format!(
                "Proxy-Authorization: Bearer {}\r\n",
                mint("other", "acme/orders", 300)
            ),
            format!("Proxy-Authorization: Bearer {token}x\r\n"),
            "Proxy-Authorization: Bearer nonsense\r\n".to_owned(),
        ] {
            let answer = exchange(&mut io, &get(&missing_or_wrong)).await.expect(407);
            assert_eq!(answer.code(), "proxy_token_required");
            assert_eq!(
                answer.headers("proxy-authenticate"),
                [
                    r#"Basic realm="countersign""#,
                    r#"Bearer realm="countersign""#
                ]
            );
            refused += 1;
        }
        let other = format!(
            "Proxy-Authorization: Bearer {}\r\n",
            mint("countersign", "evil/orders", 300)
        );
        let answer = exchange(&mut io, &get(&other)).await.expect(403);
        assert_eq!(answer.code(), "policy_denied");
        refused += 1;
        assert_eq!(world.plain_api.seen().len(), before);
        exchange(&mut io, &get(presented)).await.expect(200);
    }
    // The gateway is an origin to its callers: 401, and `Authorization`.
    let mut io = gateway.connect().await;
    let ask = |header: &str| format!("GET /v1/orders HTTP/1.1\r\nHost: gateway\r\n{header}\r\n");
    let authorization = format!("Authorization: Bearer {token}\r\n");
    exchange(&mut io, &ask(&authorization)).await.expect(200);
    let answer = exchange(&mut io, &ask("")).await.expect(401);
    assert_eq!(answer.code(), "token_required");
    assert_eq!(
        answer.headers("www-authenticate"),
        [r#"Bearer realm="countersign""#]
    );
    refused += 1;
    exchange(&mut io, &ask(&authorization)).await.expect(200);
    // Nor does a token cover the other requests of an HTTP/2 connection.
    let mut client = Client::http2(&gateway).await;
    for (authorization, status) in [(Some(&token), 200), (None, 401), (Some(&token), 200)] {
        let mut request = http::Request::get("http://gateway/v1/orders");
        if let Some(token) = authorization {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let before = world.api.seen().len();
        let request = request.body(http_body_util::Empty::new()).unwrap();
        let answer = client.send(request).await.unwrap();
        assert_eq!(answer.status(), status);
        let arrived = world.api.seen().len() - before;
        assert_eq!(arrived, usize::from(status == 200));
        refused += usize::from(status == 401);
    }
    // The presented token reached nobody.
    for seen in [world.api.seen(), world.plain_api.seen()].concat() {
        assert!(!format!("{:?}", seen.headers).contains(&token));
        assert_eq!(seen.token.unwrap()["sub"], "orders-agent");
    }
    // A tunnel's token holds for the tunnel, until it expires: then the tunnel ends.
    let short = mint("countersign", "acme/orders", 15);
    let mut io = proxy.connect().await;
    let connect = format!(
        "CONNECT plain.example.test:80 HTTP/1.1\r\nHost: plain.example.test:80\r\nProxy-Authorization: Bearer {short}\r\n\r\n"
    );
    tokio::io::AsyncWriteExt::write_all(&mut io, connect.as_bytes())
        .await
        .unwrap();
    let head = crate::support::raw::read_head(&mut io).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let inner = "GET /v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    for _ in 0..3 {
        exchange(&mut io, inner).await.expect(200);
    }
    let ended = tokio::time::timeout(
        Duration::from_secs(30),
        tokio::io::AsyncReadExt::read_u8(&mut io),
    )
    .await
    .expect("the tunnel ends when its token expires");
    assert!(ended.is_err());
    let mut io = proxy.connect().await;
    exchange(&mut io, &get(&bearer)).await.expect(200);
    reached("without_token", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_before_the_answer_is_asked_for_again() {
    const LIFETIME: Duration = Duration::from_secs(15);
    let mut world = World::servers().await;
    let silent = Origin::start(None, |_| Vec::new()).await;
    world.origins.push(("silent".to_owned(), silent.address));
    let common = COMMON.replace(
        "attestors:\n",
        "  - {name: silent, type: gateway, bind: \"127.0.0.1:0\", destination: silent}\nattestors:\n",
    );
    let destinations = crate::support::world::DESTINATIONS;
    let destination = "  - {name: silent, hosts: [silent.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{silent}\"}\n";
    world
        .start_agent(&format!("{common}{destinations}{destination}"), NEEDS_TOKEN)
        .await;
    let mint = |lifetime| {
        let claims = serde_json::json!({"repository": "acme/orders"});
        world
            .issuer
            .mint("job", "countersign", lifetime, &claims)
            .unwrap()
    };
    let proxy = Puppet::start(&world.target("proxy"), None).await;
    let gateway = Puppet::start(&world.target("silent"), None).await;
    let good = || async {
        let before = world.plain_api.seen().len();
        let request = format!(
            "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\nProxy-Authorization: Bearer {}\r\n\r\n",
            mint(Duration::from_secs(300))
        );
        exchange(&mut proxy.connect().await, &request)
            .await
            .expect(200);
        assert_eq!(world.plain_api.seen().len(), before + 1);
    };
    good().await;
    let rows = [
        (
            &proxy,
            "http://silent.example.test/",
            "Proxy-Authorization",
            407,
            "proxy_token_required",
            "proxy-authenticate",
        ),
        (
            &gateway,
            "/",
            "Authorization",
            401,
            "token_required",
            "www-authenticate",
        ),
    ];
    let expire = rows.map(async |(caller, uri, header, status, code, challenge)| {
        let mut io = caller.connect().await;
        let request = format!(
            "GET {uri} HTTP/1.1\r\nHost: silent.example.test\r\n{header}: Bearer {}\r\n\r\n",
            mint(LIFETIME)
        );
        let answer = exchange(&mut io, &request).await.expect(status);
        assert_eq!(answer.code(), code, "{answer:#?}");
        assert!(!answer.headers(challenge).is_empty(), "{answer:#?}");
    });
    let expired = futures_util::future::join_all(expire).await.len();
    // Both had been sent.
    assert_eq!(silent.heads().len(), expired);
    good().await;
    reached("expired_meanwhile", expired);
}

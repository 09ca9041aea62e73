//! A destination that no longer takes a token: one refresh, and one more attempt where the request can
//! be sent again.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use countersign_attestors::hexadecimal;
use serde_json::Value;

use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{Response, exchange};
use crate::support::world::{COMMON, DESTINATIONS, World};

const TWO: &str = r#"
  - {name: orders-origin, hosts: [orders-origin.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{origin}"}
  - {name: billing-origin, hosts: [billing-origin.example.test], scheme: http, credentials: [{name: billing-api}], connect_to: "{origin}"}
"#;

const ALL: &str = r#"
@id("all")
permit (principal, action == Action::"inject", resource) when { principal has unix };
"#;

const INVALID: &str = "Bearer realm=\"orders\", error=\"invalid_token\"";

/// An origin that takes every token but those it was told to refuse.
struct Setting {
    world: World,
    origin: Origin,
    refused: Arc<Mutex<HashSet<String>>>,
    challenge: Arc<Mutex<&'static str>>,
    caller: Puppet,
}

impl Setting {
    async fn start() -> Self {
        let mut world = World::servers().await;
        let refused = Arc::<Mutex<HashSet<String>>>::default();
        let challenge = Arc::new(Mutex::new(INVALID));
        let (refuses, says) = (Arc::clone(&refused), Arc::clone(&challenge));
        let origin = Origin::start(None, move |head| {
            let answer = match refuses.lock().unwrap().contains(&token(head)) {
                true => format!(
                    "HTTP/1.1 401 Unauthorized\r\nwww-authenticate: {}\r\ncontent-length: 4\r\n\r\nstop",
                    says.lock().unwrap()
                ),
                false => "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(),
            };
            vec![answer]
        })
        .await;
        world.origins.push(("origin".to_owned(), origin.address));
        world
            .start_agent(&format!("{COMMON}{DESTINATIONS}{TWO}"), ALL)
            .await;
        let caller = Puppet::start(&world.target("proxy"), None).await;
        Self {
            world,
            origin,
            refused,
            challenge,
            caller,
        }
    }

    /// Sends a request; returns the answer, the tokens that reached the origin with it, and its record.
    async fn send(&self, request: &str) -> (Response, Vec<String>, Value) {
        let before = self.origin.heads().len();
        let answer = exchange(&mut self.caller.connect().await, request).await;
        let tokens = self.origin.heads()[before..]
            .iter()
            .map(|head| token(head))
            .collect();
        let record = self.world.audited_requests().await.pop().unwrap();
        let request_id = answer.headers("countersign-request-id");
        assert_eq!(request_id, [record["request_id"].as_str().unwrap()]);
        (answer, tokens, record)
    }

    fn refuse(&self, token: &str) {
        self.refused.lock().unwrap().insert(token.to_owned());
    }

    fn token_requests(&self) -> usize {
        self.world.authorization_server.state().token_requests()
    }
}

/// The one token of a head.
fn token(head: &str) -> String {
    let tokens: Vec<_> = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(name, _)| name.eq_ignore_ascii_case("authorization"))
        .map(|(_, value)| value.strip_prefix("Bearer ").unwrap())
        .collect();
    assert_eq!(tokens.len(), 1, "{head}");
    tokens[0].to_owned()
}

fn request(method: &str, host: &str, body: &str) -> String {
    let length = match body.len() {
        0 => String::new(),
        length => format!("Content-Length: {length}\r\n"),
    };
    format!(
        "{method} http://{host}.example.test/ HTTP/1.1\r\nHost: {host}.example.test\r\n{length}\r\n{body}"
    )
}

/// The hexadecimal SHA-256 of a token, as records have it.
fn sha256(token: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes());
    hexadecimal(digest.as_ref())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_token_is_replaced_and_the_request_sent_again_once() {
    let setting = Setting::start().await;
    setting.world.good().await;
    let get = request("GET", "orders-origin", "");
    let (answer, tokens, record) = setting.send(&get).await;
    answer.expect(200);
    assert_eq!(record["attempts"], Value::Null, "{record}");
    let [first] = tokens.as_slice() else {
        panic!("{tokens:?}")
    };
    assert_eq!(setting.token_requests(), 1);

    // The caller sees nothing of it.
    setting.refuse(first);
    let (answer, tokens, record) = setting.send(&get).await;
    assert_eq!(answer.expect(200).body, "ok");
    let [rejected, second] = tokens.as_slice() else {
        panic!("{tokens:?}")
    };
    assert_eq!(rejected, first);
    assert_ne!(second, first);
    assert_eq!(record["attempts"], 2, "{record}");
    assert_eq!(record["token"]["sha256"], sha256(second), "{record}");
    assert_eq!(record["token"]["obtained"], "minted", "{record}");
    assert_eq!(setting.token_requests(), 2);
    let metrics = setting.world.app().agent().metrics.encode();
    let counted =
        "countersign_upstream_rejections_total{credential=\"orders-api\",status=\"401\"} 1";
    assert!(metrics.contains(counted), "{metrics}");

    // Whoever takes no token at all makes no load: the next is not minted before its time.
    setting.refuse(second);
    for _ in 0..3 {
        let (answer, tokens, record) = setting.send(&get).await;
        let answer = answer.expect(401);
        assert_eq!(
            (answer.body.as_str(), answer.headers("www-authenticate")),
            ("stop", vec![INVALID])
        );
        assert_eq!(tokens, [second.as_str()]);
        assert_eq!(record["attempts"], Value::Null, "{record}");
        assert_eq!(record["status"], 401, "{record}");
    }
    assert_eq!(setting.token_requests(), 2);
    setting.refused.lock().unwrap().clear();
    let (answer, tokens, _) = setting.send(&get).await;
    answer.expect(200);
    assert_eq!(tokens, [second.as_str()]);
    setting.world.good().await;
    reached("sent_again", 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_sent_again_is_not_and_other_challenges_are_the_callers() {
    let setting = Setting::start().await;
    setting.world.good().await;
    let get = request("GET", "billing-origin", "");
    let post = request("POST", "billing-origin", "hi");
    let (answer, tokens, _) = setting.send(&post).await;
    answer.expect(200);
    let first = tokens[0].clone();
    let mut handed_on = 0;

    // A 401 that says nothing of the token, or something else of it, costs no token.
    setting.refuse(&first);
    for challenge in [
        "Basic realm=\"orders\"",
        "Bearer",
        "Bearer error=\"insufficient_scope\"",
    ] {
        *setting.challenge.lock().unwrap() = challenge;
        for request in [&get, &post] {
            let (answer, tokens, record) = setting.send(request).await;
            let answer = answer.expect(401);
            assert_eq!(answer.headers("www-authenticate"), [challenge]);
            assert_eq!(answer.headers("proxy-status"), Vec::<&str>::new());
            assert_eq!(tokens, [first.as_str()], "{challenge}");
            assert_eq!(record["outcome"], "ok", "{record}");
            handed_on += 1;
        }
    }
    let requests = setting.token_requests();

    // What has a body was streamed, and is gone: the caller is told, and the token is not used again.
    *setting.challenge.lock().unwrap() = INVALID;
    let (answer, tokens, record) = setting.send(&post).await;
    answer.expect(401);
    assert_eq!(tokens, [first.as_str()]);
    assert_eq!(record["attempts"], Value::Null, "{record}");
    assert_eq!(setting.token_requests(), requests);
    handed_on += 1;
    let (answer, tokens, record) = setting.send(&post).await;
    answer.expect(200);
    assert_ne!(tokens, [first.as_str()]);
    assert_eq!(record["attempts"], Value::Null, "{record}");
    assert_eq!(setting.token_requests(), requests + 1);
    setting.world.good().await;
    reached("challenges_handed_on", handed_on);
}

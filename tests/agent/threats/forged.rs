//! An OIDC issuer whose key the test has, to sign what no issuer would.

use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::{Response, exchange};
use crate::support::unprivileged;
use crate::support::world::{COMMON, DESTINATIONS, ISSUER, World};

const KEY_ID: &str = "issuers-key";

const POLICIES: &str = r#"
@id("root")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == {uid} };
@id("ci-orders")
permit (principal, action == Action::"inject", resource == Credential::"billing-api")
when { principal has ci.repository && principal.ci.repository == "acme/orders" };
"#;

/// A key of P-256.
pub(super) struct Key(EcdsaKeyPair);

impl Key {
    pub(super) fn generate() -> Self {
        Self(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
    }

    /// The public point, uncompressed.
    pub(super) fn point(&self) -> &[u8] {
        self.0.public_key().as_ref()
    }

    pub(super) fn jwk(&self) -> Value {
        let coordinates = self.point()[1..].split_at(32);
        json!({
            "kty": "EC", "crv": "P-256", "kid": KEY_ID, "use": "sig", "alg": "ES256",
            "x": encode(coordinates.0), "y": encode(coordinates.1),
        })
    }

    /// What JWS wants of ES256: both numbers one after the other.
    pub(super) fn signature(&self, signed: &str) -> Vec<u8> {
        let signature = self.0.sign(&SystemRandom::new(), signed.as_bytes());
        signature.unwrap().as_ref().to_vec()
    }

    /// The token of a header and claims, each as JSON text.
    pub(super) fn sign(&self, header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", encode(header), encode(claims));
        let signature = self.signature(&signed);
        format!("{signed}.{}", encode(signature))
    }
}

pub(super) fn encode(part: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(part)
}

/// A good token's header, with `changes`; `null` takes a field away.
pub(super) fn header(changes: Value) -> String {
    changed(
        json!({"alg": "ES256", "kid": KEY_ID, "typ": "JWT"}),
        changes,
    )
}

/// A good token's claims, with `changes`.
pub(super) fn claims(changes: Value) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let good = json!({
        "iss": ISSUER, "sub": "job", "aud": "countersign", "repository": "acme/orders",
        "iat": now, "nbf": now, "exp": now + 300,
    });
    changed(good, changes)
}

fn changed(mut good: Value, changes: Value) -> String {
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => good.as_object_mut().unwrap().remove(name),
            value => good
                .as_object_mut()
                .unwrap()
                .insert(name.clone(), value.clone()),
        };
    }
    good.to_string()
}

/// A world whose issuer is the test's own, and a caller who gets a credential by that issuer's token only.
pub(super) struct Setting {
    pub(super) world: World,
    pub(super) key: Key,
    pub(super) issuer: Origin,
    caller: Puppet,
}

impl Setting {
    /// `settings` are more of the issuer's in the configuration.
    pub(super) async fn start(settings: &str) -> Self {
        let mut world = World::servers().await;
        let key = Key::generate();
        let keys = json!({"keys": [key.jwk()]}).to_string();
        let metadata = json!({"issuer": ISSUER, "jwks_uri": format!("{ISSUER}/jwks")}).to_string();
        let certificate = world.authority.issue(&["ci.example.test"]).unwrap();
        let issuer = Origin::start(Some(&certificate), move |head| {
            let body = match head.starts_with("GET /jwks ") {
                true => &keys,
                false => &metadata,
            };
            let length = body.len();
            vec![format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"
            )]
        })
        .await;
        world.origins.push(("issuer".to_owned(), issuer.address));
        let common = COMMON.replace(
            "connect_to: \"{issuer}\"",
            &format!("connect_to: \"{{issuer}}\"{settings}"),
        );
        let destinations = DESTINATIONS.replace(
            "    scheme: http\n    paths: [\"/v1/**\"]\n    credentials: [{name: orders-api}]",
            "    scheme: http\n    paths: [\"/v1/**\"]\n    credentials: [{name: billing-api}]",
        );
        world
            .start_agent(&format!("{common}{destinations}"), POLICIES)
            .await;
        let caller = Puppet::start(&world.target("proxy"), unprivileged()).await;
        Self {
            world,
            key,
            issuer,
            caller,
        }
    }

    /// Presents a token; what is answered, and that the origin saw a request where it is 200 only.
    pub(super) async fn present(&self, token: &str) -> Response {
        let before = self.world.plain_api.seen().len();
        let request = format!(
            "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\nProxy-Authorization: Bearer {token}\r\n\r\n"
        );
        let answer = exchange(&mut self.caller.connect().await, &request).await;
        let arrived = self.world.plain_api.seen().len() - before;
        assert_eq!(arrived, usize::from(answer.status == 200), "{answer:#?}");
        answer
    }

    /// A good token of the issuer's is taken.
    pub(super) async fn good(&self) {
        let token = self.key.sign(&header(json!({})), &claims(json!({})));
        self.present(&token).await.expect(200);
        self.world.good().await;
    }

    /// A token is refused as none.
    pub(super) async fn is_refused(&self, what: &str, token: &str) {
        let answer = self.present(token).await;
        let found = (answer.status, answer.code());
        assert_eq!(found, (407, "proxy_token_required".to_owned()), "{what}");
    }
}

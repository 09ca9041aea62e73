//! An issuer, its keys and signatures by them, for the targets that read tokens. The keys are those of
//! the standards' examples, so that seeds can hold their public halves.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use countersign_attestors::{
    Attestation, Attestor, AttributeType, Clock, Evidence, Fetch, FetchError, OidcAttestor,
    OidcIssuerSettings, PresentedToken,
};
use url::Url;

pub const ISSUER: &str = "https://ci.example.com";
pub const AUDIENCE: &str = "countersign";

/// 2026-11-18, 12:00 UTC, in seconds.
pub const NOW: u64 = 1_795_003_200;

/// The public half of [`ES256`], with which the issuer signs.
pub const ES256_X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
pub const ES256_Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";
/// The public half of [`ED25519`].
pub const ED25519_X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";

/// RFC 7515 appendix A.3.
static ES256: LazyLock<EcdsaKeyPair> = LazyLock::new(|| {
    let point = [vec![4], decode(ES256_X), decode(ES256_Y)].concat();
    let private = decode("jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI");
    let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
    EcdsaKeyPair::from_private_key_and_public_key(algorithm, &private, &point).expect("a key")
});

/// RFC 8037 appendix A.1.
static ED25519: LazyLock<Ed25519KeyPair> = LazyLock::new(|| {
    let private = decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A");
    Ed25519KeyPair::from_seed_and_public_key(&private, &decode(ED25519_X)).expect("a key")
});

/// Nobody's.
static STRANGER: LazyLock<EcdsaKeyPair> =
    LazyLock::new(|| EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key"));

fn decode(text: &str) -> Vec<u8> {
    URL_SAFE_NO_PAD.decode(text).expect("base64url")
}

/// Header and claims as they are, with the signature that `signer` makes; `None` for an unknown one.
pub fn token(header: &[u8], claims: &[u8], signer: &str) -> Option<String> {
    let [header, claims] = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part));
    let signed = format!("{header}.{claims}");
    let by = |key: &EcdsaKeyPair| {
        let signature = key.sign(&SystemRandom::new(), signed.as_bytes());
        signature.expect("a signature").as_ref().to_vec()
    };
    let signature = match signer {
        "ES256" => by(&ES256),
        "EdDSA" => ED25519.sign(signed.as_bytes()).as_ref().to_vec(),
        "stranger" => by(&STRANGER),
        "nobody" => Vec::new(),
        // A public key taken for the secret of an HMAC.
        "HS256" => {
            let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, ES256_X.as_bytes());
            aws_lc_rs::hmac::sign(&key, signed.as_bytes())
                .as_ref()
                .to_vec()
        }
        _ => return None,
    };
    Some(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

/// Noon, for ever.
#[derive(Debug)]
struct Noon;

impl Clock for Noon {
    fn monotonic(&self) -> Duration {
        Duration::from_secs(1_000)
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
    }
}

/// An issuer whose key set is given.
struct Published(Vec<u8>);

#[async_trait]
impl Fetch for Published {
    async fn get(&self, url: &Url) -> Result<Vec<u8>, FetchError> {
        match url.path() {
            "/keys" => Ok(self.0.clone()),
            _ => Ok(format!(r#"{{"issuer":"{ISSUER}","jwks_uri":"{ISSUER}/keys"}}"#).into_bytes()),
        }
    }
}

/// The agent's attestor for an issuer that publishes `key_set`.
pub fn attestor(key_set: &[u8]) -> OidcAttestor {
    let settings = OidcIssuerSettings {
        name: "ci".to_owned(),
        issuer: ISSUER.to_owned(),
        audiences: vec![AUDIENCE.to_owned()],
        claims: [
            ("ref".to_owned(), AttributeType::String),
            ("run_attempt".to_owned(), AttributeType::Long),
            ("protected".to_owned(), AttributeType::Boolean),
            ("groups".to_owned(), AttributeType::StringSet),
        ]
        .into(),
    };
    let fetch = Arc::new(Published(key_set.to_vec()));
    OidcAttestor::new(settings, fetch, Arc::new(Noon)).expect("good settings")
}

/// What the attestor makes of a token.
pub fn attest(attestor: &OidcAttestor, token: &str) -> Attestation {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    }
    let presented = PresentedToken::new(token.to_owned());
    RUNTIME.with(|runtime| runtime.block_on(attestor.attest(Evidence::Presented(&presented))))
}

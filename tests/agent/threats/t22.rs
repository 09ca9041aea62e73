//! T22: a token that says where the agent should ask about it.

use serde_json::json;

use super::forged::{Key, Setting, claims, header};
use crate::support::counts::reached;
use crate::support::origin::Origin;

#[tokio::test(flavor = "multi_thread")]
async fn t22_no_token_steers_where_the_agent_asks() {
    // Loopback may be asked, so that nothing but whose word counts keeps the agent from the canary.
    let setting = Setting::start(", allow_addresses: [127.0.0.0/8]").await;
    let canary = Origin::start(None, |_| Vec::new()).await;
    let address = canary.address;
    setting.good().await;
    let asked = setting.issuer.connections();
    let attackers = Key::generate();
    let url = format!("https://{address}/jwks");
    let issuers = [
        format!("https://{address}"),
        format!("http://{address}"),
        format!("https://ci.example.test@{address}"),
        format!("https://ci.example.test:{}", address.port()),
        format!("https://{address}#https://ci.example.test"),
        format!("https://{address}/https://ci.example.test"),
        format!("https://localhost:{}", address.port()),
    ];
    let fields = [
        json!({"jku": url}),
        json!({"jku": format!("http://{address}/jwks")}),
        json!({"x5u": url}),
        json!({"kid": url}),
        json!({"kid": format!("../../..//{address}/jwks")}),
        json!({"iss": url}),
        json!({"jwks_uri": url}),
        json!({"jku": url, "x5u": url, "kid": "another"}),
    ];
    let more_claims = [
        json!({"jwks_uri": url}),
        json!({"jku": url}),
        json!({"_claim_sources": {"a": {"endpoint": url}}}),
        json!({"issuer": url, "iss": url}),
        json!({"sub_jwk": attackers.jwk(), "cnf": {"jku": url}}),
    ];
    let mut tokens = Vec::new();
    for issuer in &issuers {
        let claims = claims(json!({"iss": issuer}));
        for key in [&attackers, &setting.key] {
            tokens.push((
                issuer.clone(),
                key.sign(&header(json!({"jku": url})), &claims),
            ));
        }
    }
    for changes in &fields {
        let token = attackers.sign(&header(changes.clone()), &claims(json!({})));
        tokens.push((changes.to_string(), token));
    }
    for changes in &more_claims {
        let token = attackers.sign(&header(json!({})), &claims(changes.clone()));
        tokens.push((changes.to_string(), token));
    }
    for (what, token) in &tokens {
        let answer = setting.present(token).await;
        assert_eq!(canary.connections(), 0, "{what} leads to the canary");
        assert_eq!(answer.expect(407).code(), "proxy_token_required", "{what}");
    }
    // A key that it does not know is reason to ask its issuer once more.
    assert!(setting.issuer.connections() <= asked + 2);
    setting.good().await;
    reached("steering_tokens", tokens.len());
}

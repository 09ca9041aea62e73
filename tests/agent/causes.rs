//! The cause label of trouble with a destination: in the answer and in the record.

use crate::support::counts::reached;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

const DESTINATIONS_IN_TROUBLE: &str = r#"
  - {name: gone, hosts: [gone.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "127.0.0.1:1"}
  - {name: untrusted, hosts: [untrusted.example.test], credentials: [{name: orders-api}], connect_to: "{api}", ca_file: servers.pem}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn trouble_with_a_destination_has_a_cause() {
    let mut world = World::servers().await;
    world
        .start_agent(
            &format!("{COMMON}{DESTINATIONS}{DESTINATIONS_IN_TROUBLE}"),
            POLICIES,
        )
        .await;
    world.good().await;
    let rows = [
        (
            "http://gone.example.test/",
            "upstream_unreachable",
            "network",
        ),
        (
            // Its certificate is for other names.
            "https://untrusted.example.test/",
            "upstream_tls",
            "client_misconfiguration",
        ),
    ];
    for (url, code, cause) in rows {
        let seen = world.api.seen().len();
        let answer = world.curl(&[url]).await.expect(502);
        assert_eq!(answer.code(), code, "{answer:#?}");
        assert_eq!(answer.json()["cause"], cause, "{answer:#?}");
        let record = world.audited_requests().await.pop().unwrap();
        assert_eq!(record["outcome"], code, "{record:#?}");
        assert_eq!(record["cause"], cause, "{record:#?}");
        assert_eq!(world.api.seen().len(), seen, "the origin saw a request");
    }
    let answer = world
        .curl(&["-X", "DELETE", "https://orders.example.test/v1/orders/7"])
        .await
        .expect(403);
    assert!(answer.json()["cause"].is_null(), "{answer:#?}");
    world.good().await;
    let record = world.audited_requests().await.pop().unwrap();
    assert!(record["cause"].is_null(), "{record:#?}");
    reached("causes", rows.len());
}

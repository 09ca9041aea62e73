//! T9: a redirect that would lead a token, or an assertion, elsewhere.

use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::puppet::Puppet;
use crate::support::raw::exchange;
use crate::support::world::{COMMON, DESTINATIONS, World};

const STATUSES: [u16; 5] = [301, 302, 303, 307, 308];

/// Where a redirect leads: to no destination, to one without a credential, to the address itself.
const LOCATIONS: [&str; 3] = [
    "http://elsewhere.example.test/",
    "http://open.example.test/",
    "http://{open}/",
];

const CREDENTIAL: &str = r#"
  - name: redirected
    type: oauth_client_credentials
    token_endpoint: https://auth.example.test/token
    client_id: agent
    client_authentication: {method: client_secret_basic, secret_file: secret}
    ca_file: servers.pem
    connect_to: "{endpoint}"
"#;

const MORE_DESTINATIONS: &str = r#"
  - {name: redirecting, hosts: [redirecting.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: "{redirecting}"}
  - {name: open, hosts: [open.example.test], scheme: http, connect_to: "{open}"}
  - {name: redirected, hosts: [redirected.example.test], scheme: http, credentials: [{name: redirected}], connect_to: "{open}"}
"#;

const POLICIES: &str = r#"
@id("everything")
permit (principal, action, resource) when { principal has unix };
"#;

/// `/STATUS/N` is answered with a redirect to the Nth location.
fn redirect(head: &str, locations: &[String]) -> Vec<String> {
    let path: Vec<&str> = head.split([' ', '/']).collect();
    let location = &locations[path[3].parse::<usize>().unwrap()];
    vec![format!(
        "HTTP/1.1 {} Elsewhere\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n",
        path[2]
    )]
}

#[tokio::test(flavor = "multi_thread")]
async fn t09_no_redirect_leads_a_token_elsewhere() {
    let mut world = World::servers().await;
    let ok = |_: &str| vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned()];
    let open = Origin::start(None, ok).await;
    let locations = LOCATIONS.map(|to| to.replace("{open}", &open.address.to_string()));
    let redirecting = Origin::start(None, move |head| redirect(head, &locations)).await;
    let certificate = world.authority.issue(&["auth.example.test"]).unwrap();
    let endpoint = Origin::start(Some(&certificate), |head| {
        vec![match head.starts_with("POST /token ") {
            true => "HTTP/1.1 307 Elsewhere\r\nlocation: https://auth.example.test/elsewhere\r\ncontent-length: 0\r\n\r\n",
            false => "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 64\r\n\r\n{\"access_token\": \"redirected\", \"token_type\": \"Bearer\"}          ",
        }.to_owned()]
    })
    .await;
    for (name, origin) in [
        ("open", &open),
        ("redirecting", &redirecting),
        ("endpoint", &endpoint),
    ] {
        world.origins.push((name.to_owned(), origin.address));
    }
    world.write("secret", "canary-secret");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(world.path("secret"), mode).unwrap();
    let (credentials, after) = COMMON.split_once("interception:").unwrap();
    let common = format!("{}{CREDENTIAL}interception:{after}", credentials.trim_end());
    let configuration = format!("{common}{DESTINATIONS}{MORE_DESTINATIONS}");
    world.start_agent(&configuration, POLICIES).await;
    let caller = Puppet::start(&world.target("proxy"), None).await;
    world.good().await;

    // The redirect is the caller's to follow, and shows it no token.
    let mut redirects = 0;
    for status in STATUSES {
        for location in 0..LOCATIONS.len() {
            for method in ["GET", "POST"] {
                let request = format!(
                    "{method} http://redirecting.example.test/{status}/{location} HTTP/1.1\r\nHost: redirecting.example.test\r\nContent-Length: 0\r\n\r\n"
                );
                let answer = exchange(&mut caller.connect().await, &request).await;
                let answer = answer.expect(status);
                assert!(
                    !answer.head.to_lowercase().contains("bearer"),
                    "{answer:#?}"
                );
                redirects += 1;
            }
        }
    }
    assert_eq!(redirecting.heads().len(), redirects);
    assert_eq!(open.connections(), 0);
    // A client that follows it asks anew, and is decided anew.
    for (location, status) in [("0", 403), ("1", 200)] {
        let url = format!("http://redirecting.example.test/307/{location}");
        world.curl(&["-L", &url]).await.expect(status);
    }
    let followed = open.heads();
    assert_eq!(followed.len(), 1);
    assert!(
        !followed[0].to_lowercase().contains("authorization"),
        "{followed:?}"
    );

    // Nor does a token endpoint lead the agent's own secret elsewhere.
    let request =
        "GET http://redirected.example.test/ HTTP/1.1\r\nHost: redirected.example.test\r\n\r\n";
    let answer = exchange(&mut caller.connect().await, request).await;
    let asked = endpoint.heads();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(answer.code(), "token_server_redirected", "{answer:#?}");
    assert_eq!(open.heads().len(), 1);
    world.good().await;
    reached("redirects", redirects);
}

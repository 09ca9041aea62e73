//! `Alt-Svc` leads no client past the agent (RFC 7838), on whichever answer it stands.

use tokio::io::AsyncWriteExt;

use crate::support::origin::Origin;
use crate::support::raw::read_response;
use crate::support::world::{COMMON, DESTINATIONS, POLICIES, World};

const ALTERNATIVE: &str = "alt-svc: h3=\":443\"\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_offers_another_way() {
    let mut world = World::servers().await;
    let origin = Origin::start(None, |head| {
        match head.to_ascii_lowercase().contains("upgrade: websocket") {
            true => vec![format!(
                "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n{ALTERNATIVE}\r\n"
            )],
            false => vec![
                format!("HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n{ALTERNATIVE}\r\n"),
                format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{ALTERNATIVE}\r\nok"),
            ],
        }
    })
    .await;
    world.origins.push(("origin".to_owned(), origin.address));
    let destination = "  - {name: origin, hosts: [origin.example.test], scheme: http, credentials: [{name: orders-api}], connect_to: \"{origin}\"}\n";
    world
        .start_agent(&format!("{COMMON}{DESTINATIONS}{destination}"), POLICIES)
        .await;
    world.good().await;
    let mut io = world.connect().await;
    let get = "GET http://origin.example.test/ HTTP/1.1\r\nHost: origin.example.test\r\n";
    io.write_all(format!("{get}\r\n").as_bytes()).await.unwrap();
    let hints = read_response(&mut io).await.expect(103);
    let answer = read_response(&mut io).await.expect(200);
    let upgrade = format!("{get}Connection: upgrade\r\nUpgrade: websocket\r\n\r\n");
    io.write_all(upgrade.as_bytes()).await.unwrap();
    let switched = read_response(&mut io).await.expect(101);
    assert_eq!(switched.headers("upgrade"), ["websocket"]);
    for answer in [hints, answer, switched] {
        assert!(answer.headers("alt-svc").is_empty(), "{answer:#?}");
    }
    assert_eq!(origin.heads().len(), 2);
    world.good().await;
}

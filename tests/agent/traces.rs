//! The caller's trace: passed on as it came, and recorded (W3C Trace Context).

use crate::support::counts::reached;
use crate::support::world::World;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_trace_is_passed_on_and_recorded() {
    let world = World::start().await;
    world.good().await;
    let valid = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let mut passed = 0;
    for url in [
        "https://orders.example.test/v1/orders",
        "http://plain.example.test/v1/orders",
    ] {
        for (parents, trace_id) in [
            (vec![valid.as_str()], Some(TRACE)),
            (vec![], None),
            // What is not valid is no trace; it is not ours to remove.
            (vec!["00-nonsense"], None),
            (vec![&valid, &valid], None),
        ] {
            world.api.forget();
            world.plain_api.forget();
            let state = "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7";
            let state_field = format!("tracestate: {state}");
            let parent_fields: Vec<_> = parents
                .iter()
                .map(|value| format!("traceparent: {value}"))
                .collect();
            let mut arguments = vec!["-H", &state_field, url];
            for field in &parent_fields {
                arguments.extend(["-H", field]);
            }
            let answer = world.curl(&arguments).await.expect(200);
            let seen = [world.api.seen(), world.plain_api.seen()].concat();
            assert_eq!(seen.len(), 1);
            let values = |name: &str| -> Vec<String> {
                let values = seen[0].headers.get_all(name).iter();
                values
                    .map(|value| value.to_str().unwrap().to_owned())
                    .collect()
            };
            assert_eq!(values("traceparent"), parents);
            assert_eq!(values("tracestate"), [state]);
            let record = world.audited_requests().await.pop().unwrap();
            let request_id = answer.header("countersign-request-id").unwrap();
            assert_eq!(record["request_id"], request_id);
            assert_eq!(record["trace_id"].as_str(), trace_id, "{record}");
            passed += 1;
        }
    }
    // Of what is refused, too.
    let field = format!("traceparent: {valid}");
    let url = "https://orders.example.test/v1/orders/7";
    world
        .curl(&["-X", "DELETE", "-H", &field, url])
        .await
        .expect(403);
    let record = world.audited_requests().await.pop().unwrap();
    assert_eq!(record["trace_id"], TRACE, "{record}");
    world.good().await;
    reached("traces", passed + 1);
}

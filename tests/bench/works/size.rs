//! What a request costs with many destinations, credentials and policies, and with many identities.

use std::fmt::Write;

use crate::Fallible;
use crate::bench::Bench;
use crate::caller::Form;
use crate::load::IDENTITIES;
use crate::measure::{Rounds, Sample, median};
use crate::peers::{AddedFile, Peer, Proxy};
use crate::report::Must;

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 7;
const LARGE: usize = 1000;

pub fn run(bench: &mut Bench) -> Fallible<()> {
    with_configuration(bench)?;
    with_identities(bench)
}

/// The request goes to the last of the destinations.
fn with_configuration(bench: &mut Bench) -> Fallible<()> {
    let origin = bench.origin.addresses.http.to_string();
    let further = further(LARGE - 1, &origin);
    let mut small = bench.start(Proxy::Countersign, Form::Absolute)?;
    let mut large = bench.start_with(Proxy::Countersign, Form::Absolute, &further)?;
    let mut ratios = Vec::new();
    for round in 0..=ROUNDS {
        let of_small = bench.repeat(&mut small, Form::Absolute, CONNECTIONS)?;
        let mut route = large.route(Form::Absolute)?;
        route.host = host(LARGE - 2);
        let length = bench.round;
        let of_large = bench.over(&mut large, &route, CONNECTIONS, |load| load.repeat(length))?;
        if round > 0 {
            ratios.push(of_large.cpu_per_request() / of_small.cpu_per_request());
        }
    }
    small.end()?;
    large.end()?;
    bench.report.must(Must::at_most(
        format!("cost with size: CPU per request with {LARGE} destinations, credentials and policies over that with 1"),
        median(ratios)?,
        "times",
        1.1,
        None,
    ));
    Ok(())
}

/// Identities share no upstream connection. The bare proxy is compared with as many: its callers share
/// theirs where there is one identity, and none where there are many.
fn with_identities(bench: &mut Bench) -> Fallible<()> {
    let proxies = [Proxy::Bare, Proxy::BareWithoutSharing, Proxy::Countersign];
    let mut peers = bench.start_all(&proxies, Form::Absolute)?;
    let (mut one, mut many) = (Rounds::default(), Rounds::default());
    for round in 0..=ROUNDS {
        for peer in &mut peers {
            if peer.proxy != Proxy::BareWithoutSharing {
                let sample = repeat_by(bench, peer, 1)?;
                if round > 0 {
                    one.add(peer.proxy, sample);
                }
            }
            if peer.proxy != Proxy::Bare {
                let sample = repeat_by(bench, peer, IDENTITIES)?;
                if round > 0 {
                    many.add(peer.proxy, sample);
                }
            }
        }
    }
    bench.end(peers)?;
    let of_one = one.ratio(Proxy::Countersign, Proxy::Bare, Sample::cpu_per_request)?;
    let of_many = many.ratio(
        Proxy::Countersign,
        Proxy::BareWithoutSharing,
        Sample::cpu_per_request,
    )?;
    bench.report.must(Must::at_most(
        format!("cost with size: CPU per request over bare hyper's with as many upstream connections, {IDENTITIES} identities over 1"),
        of_many / of_one,
        "times",
        1.1,
        None,
    ));
    Ok(())
}

fn repeat_by(bench: &mut Bench, peer: &mut Peer, identities: usize) -> Fallible<Sample> {
    let route = peer.route(Form::Absolute)?;
    let opened = bench.load.open_by(identities, &route, CONNECTIONS)?;
    bench.all_served(peer, opened)?;
    let length = bench.round;
    let sample = bench.sample(peer, |load| load.repeat(length))?;
    bench.load.close()?;
    Ok(sample)
}

/// So many further credentials, destinations at `origin`, and policies, one for each.
pub fn further(count: usize, origin: &str) -> Vec<AddedFile> {
    let mut credentials = String::from("credentials:\n");
    let mut destinations = String::from("destinations:\n");
    let mut policies = String::new();
    for number in 0..count {
        let host = host(number);
        let _ = write!(
            credentials,
            r#"  - name: further-{number}
    type: oauth_client_credentials
    issuer: https://auth.countersign.test
    client_id: bench
    client_authentication: {{method: private_key_jwt, key_file: "@CLIENT_KEY@", algorithm: ES256}}
    scopes: [orders.read]
    ca_file: "@ORIGIN_CA@"
    connect_to: "@AUTHORIZATION_SERVER@"
"#
        );
        let _ = write!(
            destinations,
            r#"  - name: further-{number}
    hosts: [{host}]
    scheme: http
    paths: ["/v1/**"]
    credentials: [{{name: further-{number}}}]
    connect_to: "{origin}"
"#
        );
        policies += &policy(
            &format!("further-{number}"),
            &format!("further-{number}"),
            number,
        );
    }
    vec![
        AddedFile {
            name: "others/further.yaml",
            text: format!("version: 1\n{credentials}{destinations}"),
        },
        AddedFile {
            name: "policies/further.cedar",
            text: policies,
        },
    ]
}

/// So many policies more that can apply to the request.
pub fn applicable(count: usize) -> AddedFile {
    AddedFile {
        name: "policies/applicable.cedar",
        text: (0..count)
            .map(|number| policy(&format!("orders-{number}"), "orders-api", number))
            .collect(),
    }
}

/// The host of one of the further destinations.
pub fn host(number: usize) -> String {
    format!("orders-{number}.countersign.test")
}

fn policy(id: &str, credential: &str, number: usize) -> String {
    format!(
        r#"@id("{id}") @max_lifetime("10m")
permit (principal, action == Action::"inject", resource == Credential::"{credential}")
when {{
  principal has unix && principal.unix.uid >= @FIRST_UID@ && principal.unix.uid < @FIRST_UID@ + @IDENTITIES@
  && context has request && context.request.safe
  && (context.request.path like "/v1/*" || context.request.path like "/v{number}/*")
}};
"#
    )
}

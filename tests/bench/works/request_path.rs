//! The request path: HTTP to HTTP, HTTP to HTTPS, and CONNECT with interception.

use crate::Fallible;
use crate::bench::Bench;
use crate::caller::Form;
use crate::measure::{Rounds, Sample};
use crate::peers::Proxy;
use crate::report::Must;

const CONNECTIONS: [usize; 3] = [1, COMPARED, 512];
/// The number of connections at which the other proxies are compared.
pub const COMPARED: usize = 64;
/// Rounds of each proxy.
const ROUNDS: usize = 7;

/// A run counts only where the bare proxy is a good one.
const BARE_OVER_NGINX: f64 = 1.1;

const REVERSE_PROXIES: &[Proxy] = &[
    Proxy::Bare,
    Proxy::Countersign,
    Proxy::Nginx,
    Proxy::Haproxy,
    Proxy::EnvoyCredentialInjector,
    Proxy::EnvoyExtAuthz,
];
const INTERCEPTING_PROXIES: &[Proxy] = &[
    Proxy::Bare,
    Proxy::Countersign,
    Proxy::Squid,
    Proxy::Mitmproxy,
];

pub fn http(bench: &mut Bench) -> Fallible<()> {
    compare(bench, "HTTP to HTTP", Form::Absolute, REVERSE_PROXIES)
}

pub fn https(bench: &mut Bench) -> Fallible<()> {
    compare(bench, "HTTP to HTTPS", Form::Origin, REVERSE_PROXIES)
}

pub fn intercept(bench: &mut Bench) -> Fallible<()> {
    compare(bench, "interception", Form::Tunnel, INTERCEPTING_PROXIES)
}

fn compare(bench: &mut Bench, work: &'static str, form: Form, proxies: &[Proxy]) -> Fallible<()> {
    let mut peers = bench.start_all(proxies, form)?;
    for connections in CONNECTIONS {
        let rounds = bench.take_turns(&mut peers, ROUNDS, |bench, peer| {
            bench.repeat(peer, form, connections)
        })?;
        bench.report.rows(work, connections, &peers, &rounds)?;
        judge(bench, work, form, connections, &rounds)?;
    }
    bench.end(peers)
}

/// The musts about CPU per request.
fn judge(
    bench: &mut Bench,
    work: &str,
    form: Form,
    connections: usize,
    rounds: &Rounds,
) -> Fallible<()> {
    if connections == 1 {
        return Ok(());
    }
    let times = |other| rounds.ratio(Proxy::Countersign, other, Sample::cpu_per_request);
    let mut must = |other: Proxy, must, aim| -> Fallible<()> {
        let name = format!(
            "{work}, {connections} connections: CPU per request over that of {}",
            other.name()
        );
        let row = Must::at_most(name, times(other)?, "times", must, Some(aim));
        bench.report.must(match other {
            Proxy::EnvoyCredentialInjector | Proxy::EnvoyExtAuthz => row.against_envoy(),
            _ => row,
        });
        Ok(())
    };
    must(Proxy::Bare, 1.3, 1.15)?;
    if connections != COMPARED {
        return Ok(());
    }
    match form {
        Form::Absolute | Form::Origin => {
            must(Proxy::EnvoyCredentialInjector, 0.40, 0.33)?;
            must(Proxy::EnvoyExtAuthz, 0.22, 0.2)?;
        }
        Form::Tunnel => must(Proxy::Squid, 0.25, 0.2)?,
    }
    if form == Form::Absolute {
        let of_bare = rounds.ratio(Proxy::Bare, Proxy::Nginx, Sample::cpu_per_request)?;
        bench.report.valid_if(
            of_bare <= BARE_OVER_NGINX,
            format!("bare hyper takes {of_bare:.3} times the CPU per request of nginx, at most {BARE_OVER_NGINX}"),
        );
    }
    Ok(())
}

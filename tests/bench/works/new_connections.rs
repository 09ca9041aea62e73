//! New intercepted connections: TCP, CONNECT, a TLS handshake, one request, and the end.

use crate::Fallible;
use crate::bench::Bench;
use crate::caller::Form;
use crate::load::IDENTITIES;
use crate::measure::Sample;
use crate::peers::Proxy;
use crate::report::Must;

const ROUNDS: usize = 5;

pub fn run(bench: &mut Bench) -> Fallible<()> {
    let proxies = [Proxy::Bare, Proxy::Countersign, Proxy::Squid];
    let mut peers = bench.start_all(&proxies, Form::Tunnel)?;
    let length = bench.round;
    let rounds = bench.take_turns(&mut peers, ROUNDS, |bench, peer| {
        let route = peer.route(Form::Tunnel)?;
        bench.sample(peer, |load| load.reconnect(&route, length))
    })?;
    bench
        .report
        .rows("new intercepted connections", IDENTITIES, &peers, &rounds)?;
    bench.report.must(Must::at_least(
        "new intercepted connections: rate over that of squid",
        rounds.ratio(Proxy::Countersign, Proxy::Squid, Sample::rate)?,
        "times",
        3.0,
        Some(4.0),
    ));
    bench.end(peers)
}

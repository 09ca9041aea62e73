//! Bodies of 1 MiB.

use crate::Fallible;
use crate::bench::Bench;
use crate::caller::Form;
use crate::measure::Sample;
use crate::origin::LARGE_BODIES;
use crate::peers::Proxy;
use crate::report::Must;

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 15;

pub fn run(bench: &mut Bench) -> Fallible<()> {
    let mut peers = bench.start_all(&[Proxy::Bare, Proxy::Countersign], Form::Absolute)?;
    let length = bench.round;
    let rounds = bench.take_turns(&mut peers, ROUNDS, |bench, peer| {
        let mut route = peer.route(Form::Absolute)?;
        route.prefix = LARGE_BODIES.to_owned();
        bench.over(peer, &route, CONNECTIONS, |load| load.repeat(length))
    })?;
    bench
        .report
        .rows("1 MiB bodies", CONNECTIONS, &peers, &rounds)?;
    bench.report.must(Must::at_most(
        "1 MiB bodies: CPU per request over that of bare hyper",
        rounds.ratio(Proxy::Countersign, Proxy::Bare, Sample::cpu_per_request)?,
        "times",
        1.1,
        Some(1.0),
    ));
    bench.end(peers)
}

//! An open loop: requests at a fixed schedule, whether those before were answered or not.

use crate::Fallible;
use crate::bench::Bench;
use crate::caller::Form;
use crate::measure::Sample;
use crate::peers::{Peer, Proxy};
use crate::report::Must;

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 7;
/// Requests a second.
const RATE: u32 = 10_000;
const STEP: u32 = 1_000;
/// Above this share of its core the bare proxy has no room to be compared in.
const MOST_BUSY: f64 = 0.7;

pub fn run(bench: &mut Bench) -> Fallible<()> {
    let proxies = [
        Proxy::Bare,
        Proxy::Countersign,
        Proxy::EnvoyCredentialInjector,
    ];
    let mut peers = bench.start_all(&proxies, Form::Absolute)?;
    let bare = peers.first_mut().ok_or("no proxy")?;
    let rate = highest_rate(bench, bare)?;
    let rounds = bench.take_turns(&mut peers, ROUNDS, |bench, peer| {
        schedule(bench, peer, rate)
    })?;
    bench
        .report
        .rows("open loop", CONNECTIONS, &peers, &rounds)?;
    bench.report.note(format!(
        "Open loop: {rate} requests/s{}.",
        match rate == RATE {
            true => "",
            false =>
                ", the most that bare hyper serves on this machine with less than 70 % of its core",
        }
    ));
    for (other, must, aim) in [
        (Proxy::Bare, 1.5, 1.3),
        (Proxy::EnvoyCredentialInjector, 0.5, 0.45),
    ] {
        let name = format!("open loop: p99 over that of {}", other.name());
        let ratio = rounds.ratio(Proxy::Countersign, other, Sample::p99)?;
        let row = Must::at_most(name, ratio, "times", must, Some(aim));
        bench.report.must(match other {
            Proxy::EnvoyCredentialInjector => row.against_envoy(),
            _ => row,
        });
    }
    bench.end(peers)
}

fn schedule(bench: &mut Bench, peer: &mut Peer, rate: u32) -> Fallible<Sample> {
    let length = bench.round;
    let route = peer.route(Form::Absolute)?;
    bench.over(peer, &route, CONNECTIONS, |load| {
        load.schedule(rate, length)
    })
}

/// [`RATE`], or what the bare proxy can serve with room to spare.
fn highest_rate(bench: &mut Bench, bare: &mut Peer) -> Fallible<u32> {
    let mut rate = RATE;
    while rate > STEP {
        let sample = schedule(bench, bare, rate)?;
        let busy = sample.cpu.as_secs_f64() / sample.wall.as_secs_f64();
        let is_served = sample.rate() >= f64::from(rate) * 0.98;
        if is_served && busy < MOST_BUSY {
            break;
        }
        rate -= STEP;
    }
    Ok(rate)
}

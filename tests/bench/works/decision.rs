//! What a decision takes, in this process: from the cache, and evaluated.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use countersign::config::Config;
use countersign::policy::{
    DecisionCache, PolicyEngine, PolicySnapshot, Resource, Revocations, described, questions, route,
};
use countersign::routing::{Route, Routes};
use countersign_attestors::{
    AttestedWorkload, AttributeSelection, Catalog, ConnectionAttestation, SystemClock, UnixAttestor,
};

use crate::bench::Bench;
use crate::caller::Form;
use crate::measure::median;
use crate::peers::{AddedFile, Proxy};
use crate::report::Must;
use crate::works::attestation::Called;
use crate::works::size::{applicable, further};
use crate::{Fallible, HOST, LOAD_CORE, PROXY_CORE, one_thread, pin};

/// Policies that can apply to the request.
const APPLICABLE: usize = 20;
const LOADED: usize = 1000;
const EVALUATIONS: usize = 10_000;
const BATCHES: usize = 500;
const BATCH: usize = 1000;

pub fn run(bench: &mut Bench) -> Fallible<()> {
    let few = vec![applicable(APPLICABLE - 1)];
    let origin = bench.origin.addresses.http.to_string();
    let mut many = further(LOADED - APPLICABLE, &origin);
    many.push(applicable(APPLICABLE - 1));

    let few = Decider::new(bench, &few)?;
    let many = Decider::new(bench, &many)?;
    let called = Called::by_a_caller(bench)?;
    let workload = attested(&called)?;
    pin(PROXY_CORE)?;
    let cached = few.cached(&workload)?;
    let evaluated = few.evaluated(&workload)?;
    let evaluated_among_many = many.evaluated(&workload)?;
    pin(LOAD_CORE)?;
    bench.load.close()?;

    bench
        .report
        .must(Must::at_most("decision: cached", cached, "ns", 150.0, None));
    for (loaded, figure) in [(APPLICABLE, evaluated), (LOADED, evaluated_among_many)] {
        bench.report.must(Must::at_most(
            format!("decision: evaluated, p99, {APPLICABLE} policies that can apply of {loaded}"),
            figure,
            "µs",
            30.0,
            Some(20.0),
        ));
    }
    Ok(())
}

fn attested(called: &Called) -> Fallible<Arc<AttestedWorkload>> {
    let catalog = Catalog::new(
        vec![Arc::new(UnixAttestor::new(AttributeSelection::all()))],
        Arc::new(SystemClock::new()),
    );
    let evidence = called.evidence()?;
    one_thread()?.block_on(async {
        let connection = ConnectionAttestation::new(Arc::new(catalog), evidence).await;
        connection
            .attest(None)
            .await
            .map_err(|ended| format!("{ended:?}").into())
    })
}

/// Decides as the agent does under a configuration.
struct Decider {
    routes: Routes,
    snapshot: Arc<PolicySnapshot>,
}

impl Decider {
    /// Under a configuration that an agent accepts.
    fn new(bench: &mut Bench, added: &[AddedFile]) -> Fallible<Self> {
        let agent = bench.start_with(Proxy::Countersign, Form::Absolute, added)?;
        let config = Config::load(&agent.directory.join("countersign.yaml"))
            .map_err(|diagnostics| format!("{diagnostics:?}"))?;
        let (engine, _) = PolicyEngine::load(&config, &config.attestors.declarations())
            .map_err(|diagnostics| format!("{diagnostics:?}"))?;
        agent.end()?;
        Ok(Self {
            routes: Routes::new(&config),
            snapshot: PolicySnapshot::new(Arc::new(engine), Revocations::none()),
        })
    }

    /// The median of batches, in nanoseconds.
    fn cached(&self, workload: &Arc<AttestedWorkload>) -> Fallible<f64> {
        let mut cache = DecisionCache::new();
        let mut took = Vec::new();
        for _ in 0..BATCHES {
            took.push(self.decide(&mut cache, workload, 0, BATCH)? / BATCH as f64);
        }
        match cache.misses() {
            1 => median(took),
            misses => Err(format!("{misses} decisions were not cached").into()),
        }
    }

    /// The 99th percentile, in microseconds. Each request asks for a scope of its own: by its path alone it
    /// would be answered from memory, for what the path matches is the same.
    fn evaluated(&self, workload: &Arc<AttestedWorkload>) -> Fallible<f64> {
        let mut cache = DecisionCache::new();
        let mut took = Vec::new();
        for number in 0..EVALUATIONS {
            took.push(self.decide(&mut cache, workload, number, 1)? / 1e3);
        }
        if cache.hits() > 0 {
            return Err(format!("{} decisions were not evaluated", cache.hits()).into());
        }
        took.sort_unstable_by(f64::total_cmp);
        let rank = EVALUATIONS * 99 / 100;
        Ok(took.get(rank).copied().ok_or("nothing was decided")?)
    }

    /// Decides the same so many times; how long that took, in nanoseconds.
    fn decide(
        &self,
        cache: &mut DecisionCache,
        workload: &Arc<AttestedWorkload>,
        number: usize,
        times: usize,
    ) -> Fallible<f64> {
        let request = Arc::new(described::request(&format!(
            "GET http://{HOST}/v1/orders/{number}"
        ))?);
        let Route::Destination(destination) = route(&self.routes, &request) else {
            return Err("no destination covers the request".into());
        };
        let (mut question, _) = questions(destination, Some(&request), SystemTime::now())
            .next()
            .ok_or("nothing is asked")?;
        let asked = Arc::from([format!("orders.{number}")]);
        if let Resource::Credential { scopes, .. } = &mut question.resource {
            *scopes = &asked;
        }
        let began = Instant::now();
        for _ in 0..times {
            let decision = cache.decide(&self.snapshot, workload, &question);
            std::hint::black_box(decision).map_err(|denial| format!("{denial:?}"))?;
        }
        Ok(began.elapsed().as_secs_f64() * 1e9)
    }
}

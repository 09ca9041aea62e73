//! The broker's single flight, the file that the agent is built of, in the orders in which its threads can run.
//! Time stands still here: expiry and the end of a wait are tested beside the code.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(
    dead_code,
    reason = "the models use what decides; the agent uses the rest"
)]
#[path = "../../src/credentials/single_flight.rs"]
mod single_flight;

mod primitives;

use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use single_flight::{
    Departure, Found, Obstacle, Outcome, Perishable, Rejection, SharedObstacle, SingleFlight, wait,
};

const NOW: Duration = Duration::from_secs(100);
const INTERVAL: Duration = Duration::from_secs(30);

/// A token, by the number of the request that brought it.
#[derive(Debug)]
struct Token(usize);

impl Perishable for Token {
    fn is_usable(&self, _: Duration) -> bool {
        true
    }

    fn lifetime(&self) -> Duration {
        Duration::from_secs(60)
    }
}

#[derive(Debug)]
struct Failure;

impl Obstacle for Failure {
    fn stands(&self, _: Duration) -> bool {
        true
    }
}

/// How a token request ends.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Token,
    Failure,
    Lost,
}

/// A key, and an authorization server that counts what it is asked.
struct Broker {
    flight: SingleFlight<Token, Failure>,
    endings: &'static [Ending],
    requests: AtomicUsize,
    in_the_air: AtomicUsize,
}

impl Broker {
    fn new(endings: &'static [Ending]) -> Arc<Self> {
        Arc::new(Self {
            flight: SingleFlight::new(Arc::new(SharedObstacle::new())),
            endings,
            requests: AtomicUsize::new(0),
            in_the_air: AtomicUsize::new(0),
        })
    }

    /// One that holds the token of a request before.
    fn with_token(endings: &'static [Ending]) -> (Arc<Self>, Arc<Token>) {
        let broker = Self::new(endings);
        let token = Arc::new(Token(usize::MAX));
        broker.flight.succeed(&token);
        (broker, token)
    }

    /// What a caller gets, in the steps of `Credentials::obtain`.
    fn obtain(self: &Arc<Self>) -> Option<Outcome<Token, Failure>> {
        if let Some(token) = self.flight.usable_token(NOW) {
            return Some(Ok(token));
        }
        let take_off = |departure| self.take_off(departure);
        match self.flight.join_or_start(NOW, take_off) {
            Found::Token(token) => Some(Ok(token)),
            Found::Obstacle(failure) => Some(Err(failure)),
            Found::Flight(landing, _) => loom::future::block_on(wait(landing)),
        }
    }

    /// Renews `token`, which was found to be due.
    fn renew(self: &Arc<Self>, token: &Arc<Token>) {
        let take_off = |departure| self.take_off(departure);
        self.flight.renew(token, NOW, take_off);
    }

    /// Renews it in a thread of its own.
    fn renew_beside(self: &Arc<Self>, token: &Arc<Token>) -> thread::JoinHandle<()> {
        let (broker, token) = (Arc::clone(self), Arc::clone(token));
        thread::spawn(move || broker.renew(&token))
    }

    fn take_off(self: &Arc<Self>, departure: Departure<Token, Failure>) {
        let broker = Arc::clone(self);
        thread::spawn(move || broker.fly(departure));
    }

    fn fly(&self, departure: Departure<Token, Failure>) {
        let others = self.in_the_air.fetch_add(1, Ordering::SeqCst);
        assert_eq!(others, 0, "two token requests for one key at one time");
        let request = self.requests.fetch_add(1, Ordering::SeqCst);
        self.in_the_air.fetch_sub(1, Ordering::SeqCst);
        match *self
            .endings
            .get(request)
            .expect("more token requests than there are endings")
        {
            Ending::Token => {
                let token = Arc::new(Token(request));
                self.flight.succeed(&token);
                departure.land(Ok(token));
            }
            Ending::Failure => departure.land(Err(self.flight.fail(|_| Failure))),
            Ending::Lost => drop(departure),
        }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// Runs `steps` in every order of its threads in which at most three times one is stopped midway for another.
/// Without a bound it takes hours.
fn explore(steps: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(steps);
}

/// What two callers get that come at any time.
fn two_callers(broker: &Arc<Broker>) -> [Option<Outcome<Token, Failure>>; 2] {
    let other = Arc::clone(broker);
    let other = thread::spawn(move || other.obtain());
    let ours = broker.obtain();
    [ours, other.join().unwrap()]
}

#[test]
fn callers_of_a_cold_key_share_one_request() {
    explore(|| {
        let broker = Broker::new(&[Ending::Token]);
        for outcome in two_callers(&broker) {
            assert_eq!(outcome.unwrap().unwrap().0, 0);
        }
        assert_eq!(broker.requests(), 1);
        assert_eq!(broker.obtain().unwrap().unwrap().0, 0);
    });
}

#[test]
fn a_failure_answers_all_and_forbids_another_request() {
    explore(|| {
        let broker = Broker::new(&[Ending::Failure]);
        for outcome in two_callers(&broker) {
            outcome.unwrap().unwrap_err();
        }
        broker.obtain().unwrap().unwrap_err();
        assert_eq!(broker.requests(), 1);
    });
}

#[test]
fn a_lost_flight_leaves_nobody_waiting_and_stops_no_other() {
    explore(|| {
        let broker = Broker::new(&[Ending::Lost, Ending::Token]);
        let outcomes = two_callers(&broker);
        assert!(outcomes.iter().any(Option::is_none));
        assert_eq!(broker.obtain().unwrap().unwrap().0, 1);
        assert_eq!(broker.requests(), 2);
    });
}

#[test]
fn a_token_that_two_callers_find_due_is_renewed_once() {
    explore(|| {
        let (broker, due) = Broker::with_token(&[Ending::Token]);
        let other = broker.renew_beside(&due);
        broker.renew(&due);
        other.join().unwrap();
        // Asked in this order: one that is not in the air any more has landed.
        assert!(broker.flight.is_in_the_air() || broker.flight.token().unwrap().0 == 0);
        assert!(broker.requests() <= 1);
    });
}

#[test]
fn a_token_refused_while_it_is_renewed_gives_way_to_its_successor() {
    explore(|| {
        let (broker, refused) = Broker::with_token(&[Ending::Token]);
        let renewing = broker.renew_beside(&refused);
        let rejection = broker.flight.reject(&refused, NOW, INTERVAL);
        assert_ne!(rejection, Rejection::Kept);
        // Whether it joins the renewal or comes first, it never gets what was refused.
        assert_eq!(broker.obtain().unwrap().unwrap().0, 0);
        renewing.join().unwrap();
        assert_eq!(broker.requests(), 1);
        assert_eq!(broker.obtain().unwrap().unwrap().0, 0);
    });
}

#[test]
fn two_refusals_of_one_token_fetch_one_other() {
    explore(|| {
        let (broker, refused) = Broker::with_token(&[Ending::Token]);
        let refuse = |broker: &Arc<Broker>, refused: &Arc<Token>| {
            let rejection = broker.flight.reject(refused, NOW, INTERVAL);
            (rejection, broker.obtain().unwrap().unwrap().0)
        };
        let (other_broker, other_refused) = (Arc::clone(&broker), Arc::clone(&refused));
        let other = thread::spawn(move || refuse(&other_broker, &other_refused));
        let (ours, our_token) = refuse(&broker, &refused);
        let (other, other_token) = other.join().unwrap();
        assert!(matches!(
            (ours, other),
            (Rejection::Dropped, Rejection::Replaced) | (Rejection::Replaced, Rejection::Dropped)
        ));
        assert_eq!([our_token, other_token], [0, 0]);
        assert_eq!(broker.requests(), 1);
    });
}

#[test]
fn a_revocation_takes_the_token_it_means_and_no_other() {
    explore(|| {
        let (broker, revoked) = Broker::with_token(&[Ending::Token]);
        let renewing = broker.renew_beside(&revoked);
        broker.flight.drop_token(&revoked);
        assert_eq!(broker.obtain().unwrap().unwrap().0, 0);
        renewing.join().unwrap();
        assert_eq!(broker.requests(), 1);
        assert_eq!(broker.obtain().unwrap().unwrap().0, 0);
    });
}

//! The protocol over all interleavings, for small sizes: each state that two workers, three jobs and the faults below can reach
//! is visited, and what must hold is checked in each.
//!
//! **What is modelled.** `scripts.rs` holds the scripts, each by its name, reduced to what decides; `protocol.rs` who calls
//! them, and when: a producer, two workers with one slot each, the leader among them, a canceller, and the database in the
//! abstract: an execution takes effect at its commit, a job's lock belongs to one connection, and a connection outlives the
//! worker that died. Two jobs are of one user and one of another, all of one pool. Replies get lost and are asked for again
//! (enqueue, take, mark, finish); heartbeats get lost; a worker dies, or only seems dead and works on; the leader loses its key
//! and goes on with its old term; jobs are cancelled while they wait or run; statements fail and are tried again; a failover
//! loses the latest one or two writes. `Budget` says how many of each may happen in one run, so that the number of states
//! stays small; the tests below combine them. The two workers are alike, so states that differ by exchanging them are one.
//!
//! **What is left out, and why.** Time: a beat stands still for a number of intervals, any due job may be due now, and TIME is
//! beyond every fence that was handed out (also after a failover: so the servers' clocks must not differ by more than a
//! failover takes). Virtual time and weights: the ready users stand in a line; their order, like that of all replies, is
//! compared with the real scripts in `tests/protocol/anything.rs`. Wake-ups: a worker with a free slot may take at any time, as
//! its scans do. What foreign programs write; jobs of several statements; statements outside of transactions; graceful stops;
//! new runs of ended jobs. A heartbeat's answer is acted upon at once, and takes nothing back while a take is under way.
//!
//! **What holds over a failover, and what does not.** The claims, the order, the capacity and the fences hold as ever. An
//! acknowledged job may be lost if its submission was among the lost writes; no other is. A statement takes effect twice at
//! most where its COMMIT was sent and the note of its transaction was among the lost writes: then nobody is left who knows that
//! there is something to ask for. Both have a test that shows the case.

mod calls;
mod properties;
mod protocol;
mod state;

use std::collections::BTreeSet;

use properties as p;
use protocol::{Bug, Protocol, Rules};
use state::Budget;
use stateright::{Checker, HasDiscoveries, Model};

const NONE: Budget =
    Budget { lost_replies: 0, missed_beats: 0, deaths: 0, depositions: 0, cancels: 0, failures: 0, failovers: 0 };

/// Visits every state, and wants every property to hold.
#[track_caller]
fn all_hold(rules: Rules) {
    let checker = Protocol(rules).checker().symmetry().spawn_dfs().join();
    println!("{} states", checker.unique_state_count());
    if let Some((property, path)) = checker.discoveries().into_iter().next() {
        panic!("{property:?} does not hold after {:#?}\nunder {rules:#?}", path.into_actions());
    }
}

/// Visits every state, and wants these properties and no others to be broken.
#[track_caller]
fn only_these_break(rules: Rules, expected: &[&'static str]) {
    let checker = Protocol(rules).checker().symmetry().finish_when(HasDiscoveries::All).spawn_dfs().join();
    let broken: BTreeSet<_> = checker.discoveries().into_keys().collect();
    assert_eq!(broken, expected.iter().copied().collect());
}

/// Searches until all of these properties are found broken.
#[track_caller]
fn these_break(rules: Rules, expected: &[&'static str]) {
    let expected: BTreeSet<_> = expected.iter().copied().collect();
    let wanted = HasDiscoveries::AllOf(expected.clone());
    let checker = Protocol(rules).checker().finish_when(wanted).spawn_bfs().join();
    let discoveries = checker.discoveries();
    let missed: Vec<_> = expected.iter().filter(|property| !discoveries.contains_key(*property)).collect();
    assert!(missed.is_empty(), "nothing was found against {missed:?}");
    for property in expected {
        let actions = checker.assert_any_discovery(property).into_actions();
        println!("{property:?} is broken by {actions:?}");
    }
}

#[test]
fn without_faults() {
    for capacity in 1..=3 {
        all_hold(Rules { producer: true, ..Rules::new(capacity, NONE) });
    }
}

#[test]
fn lost_replies() {
    let budget = Budget { lost_replies: 2, failures: 1, ..NONE };
    all_hold(Rules::new(1, budget));
    all_hold(Rules { producer: true, ..Rules::new(2, budget) });
}

#[test]
fn a_worker_that_dies() {
    let budget = Budget { deaths: 1, lost_replies: 1, cancels: 1, ..NONE };
    all_hold(Rules::new(1, budget));
    all_hold(Rules::new(2, budget));
}

#[test]
fn a_worker_that_dies_while_jobs_fail_and_are_cancelled() {
    all_hold(Rules::new(2, Budget { deaths: 1, cancels: 1, failures: 1, ..NONE }));
}

#[test]
fn a_worker_that_only_seems_dead() {
    all_hold(Rules::new(2, Budget { missed_beats: 2, lost_replies: 1, ..NONE }));
}

#[test]
fn a_worker_that_only_seems_dead_while_jobs_are_cancelled() {
    all_hold(Rules::new(2, Budget { missed_beats: 2, cancels: 1, ..NONE }));
}

#[test]
fn a_leader_that_is_deposed_and_goes_on() {
    all_hold(Rules::new(2, Budget { missed_beats: 2, depositions: 1, ..NONE }));
}

#[test]
fn a_leader_that_is_deposed_and_goes_on_while_another_worker_dies() {
    all_hold(Rules::new(1, Budget { missed_beats: 2, depositions: 1, deaths: 1, ..NONE }));
}

#[test]
fn a_failover() {
    all_hold(Rules { producer: true, ..Rules::new(2, Budget { failovers: 1, lost_replies: 1, ..NONE }) });
    all_hold(Rules::new(2, Budget { failovers: 1, cancels: 1, ..NONE }));
}

#[test]
fn a_failover_and_a_worker_that_dies() {
    all_hold(Rules::new(2, Budget { failovers: 1, deaths: 1, ..NONE }));
}

#[test]
fn a_failover_and_a_worker_that_only_seems_dead() {
    all_hold(Rules { lag: 1, ..Rules::new(1, Budget { failovers: 1, missed_beats: 2, ..NONE }) });
}

// What a failover can break.

#[test]
fn a_failover_that_loses_a_submission_loses_the_job() {
    let rules = Rules { producer: true, ..Rules::new(2, Budget { failovers: 1, ..NONE }) };
    these_break(rules.strict(), &[p::NONE_IS_LOST_EVER]);
}

#[test]
fn a_failover_that_loses_the_note_of_a_transaction_may_repeat_its_effect() {
    these_break(Rules::new(2, Budget { failovers: 1, ..NONE }).strict(), &[p::ONE_EFFECT_ALWAYS]);
}

#[test]
fn a_failover_that_loses_one_write_repeats_an_effect_too() {
    let rules = Rules { lag: 1, ..Rules::new(2, Budget { failovers: 1, deaths: 1, ..NONE }) };
    these_break(rules.strict(), &[p::ONE_EFFECT_ALWAYS]);
}

// Each rule of the protocol is needed: without it the checker finds what goes wrong.

#[test]
fn a_finish_must_compare_the_claim() {
    let rules = Rules::new(2, Budget { missed_beats: 2, ..NONE }).without(Bug::FinishWithoutClaim);
    these_break(rules, &[p::STALE_IS_NOTHING, p::FINAL_STAYS, p::ONE_OF_A_USER, p::RECORDS_ARE_TRUE]);
}

#[test]
fn a_fence_must_be_beyond_what_a_failover_lost() {
    let budget = Budget { failovers: 1, ..NONE };
    only_these_break(Rules::new(2, budget).without(Bug::FenceWithoutTime), &[p::FENCES_GROW]);
}

/// Dying too early costs a run, and breaks nothing else: no safety rests on time.
#[test]
fn a_session_must_be_silent_for_a_whole_lifetime_before_it_is_ended() {
    let budget = Budget { missed_beats: 1, ..NONE };
    only_these_break(Rules::new(2, budget).without(Bug::DeadAtOneMissedBeat), &[p::NO_NEEDLESS_END]);
}

#[test]
fn a_take_that_is_asked_for_again_must_be_the_same() {
    let budget = Budget { lost_replies: 1, ..NONE };
    only_these_break(Rules::new(2, budget).without(Bug::TakeNumberIgnored), &[p::NO_CLAIM_LEAKS]);
}

/// Two that believe they lead do no other harm.
#[test]
fn a_leader_must_name_its_term() {
    let budget = Budget { missed_beats: 2, depositions: 1, ..NONE };
    only_these_break(Rules::new(2, budget).without(Bug::TermIgnored), &[p::DEPOSED_IS_NOTHING]);
}

#[test]
fn a_finish_must_ready_the_users_next_job() {
    only_these_break(Rules::new(2, NONE).without(Bug::NextNotReadied), &[p::ALL_END]);
}

#[test]
fn a_cancel_must_not_end_what_a_lost_worker_may_have_done() {
    let budget = Budget { deaths: 1, cancels: 1, ..NONE };
    only_these_break(Rules::new(2, budget).without(Bug::CancelOverTrace), &[p::RECORDS_ARE_TRUE]);
}

#[test]
fn a_transaction_must_be_noted_before_its_commit() {
    let budget = Budget { deaths: 1, ..NONE };
    only_these_break(Rules::new(2, budget).without(Bug::CommitWithoutNote), &[p::ONE_EFFECT, p::RECORDS_ARE_TRUE]);
}

#[test]
fn who_takes_over_must_end_the_earlier_execution_first() {
    let budget = Budget { deaths: 1, ..NONE };
    let broken = [p::ALONE, p::ONE_EFFECT, p::RECORDS_ARE_TRUE];
    only_these_break(Rules::new(2, budget).without(Bug::BackendLeftAlone), &broken);
}

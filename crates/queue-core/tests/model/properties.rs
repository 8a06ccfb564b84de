//! What must hold in every state, and what must come about in the end.

use stateright::Property;

use crate::protocol::Protocol;
use crate::state::*;

pub const FINAL_STAYS: &str = "a final record never changes";
pub const STALE_IS_NOTHING: &str = "what a stale holder writes changes nothing";
pub const DEPOSED_IS_NOTHING: &str = "what a deposed leader asks for changes nothing";
pub const FENCES_GROW: &str = "the fences of a job grow, also over a failover";
pub const FIRST_STARTS_IN_ORDER: &str = "a user's jobs start in the order of their submission";
pub const NO_NEEDLESS_END: &str = "no session is ended that has not been silent for a lifetime";
pub const ONE_PLACE: &str = "an acknowledged job stands in exactly one place, unless a failover lost its submission";
pub const CAPACITY: &str = "no more jobs run than the pool has room for, and the pool counts them";
pub const ONE_OF_A_USER: &str = "at most one job of a user runs";
pub const NO_CLAIM_LEAKS: &str = "each claim of a session is known to its worker, unless a failover came in between";
pub const ALONE: &str = "at most one execution of a job is in a transaction";
pub const ONE_EFFECT: &str = "a job takes effect once at most, unless a failover lost the note of its transaction";
pub const RECORDS_ARE_TRUE: &str =
    "the final status tells whether the job took effect, unless a failover lost the note";
pub const ALL_END: &str = "every acknowledged job ends";
// What a failover can break.
pub const ONE_EFFECT_ALWAYS: &str = "a job takes effect once at most, whatever a failover loses";
pub const NONE_IS_LOST_EVER: &str = "an acknowledged job is never lost, whatever a failover loses";

type Check = fn(&Protocol, &State) -> bool;

/// All that holds.
pub fn all() -> Vec<Property<Protocol>> {
    let always: [(&'static str, Check); 13] = [
        (FINAL_STAYS, |_, state| !state.memory.broken.final_changed),
        (STALE_IS_NOTHING, |_, state| !state.memory.broken.stale_wrote),
        (DEPOSED_IS_NOTHING, |_, state| !state.memory.broken.deposed_wrote),
        (FENCES_GROW, |_, state| !state.memory.broken.fence_fell),
        (FIRST_STARTS_IN_ORDER, |_, state| !state.memory.broken.overtaken),
        (NO_NEEDLESS_END, |_, state| !state.memory.broken.needless_end),
        (ONE_PLACE, |_, state| (0..JOBS).all(|job| state.memory.enqueue_lost[job] || has_one_place(state, job))),
        (CAPACITY, |Protocol(rules), state| {
            let claims = state.redis.claims.iter().flatten().count();
            claims == usize::from(state.redis.running) && state.redis.running <= rules.capacity
        }),
        (ONE_OF_A_USER, |_, state| {
            (0..USERS).all(|user| {
                let claims = (0..JOBS).filter(|job| OWNER[*job] == user && state.redis.claims[*job].is_some()).count();
                claims == usize::from(state.redis.busy[user]) && claims <= 1
            })
        }),
        (NO_CLAIM_LEAKS, |_, state| state.memory.failed_over || !leaks(state)),
        (ALONE, |_, state| {
            (0..JOBS).all(|job| {
                let begun = |backend: &&Backend| backend.job == job && backend.begun;
                state.backends.iter().flatten().filter(begun).count() <= 1
            })
        }),
        (ONE_EFFECT, |_, state| (0..JOBS).all(|job| state.effects(job) <= 1 || state.memory.note_lost[job])),
        (RECORDS_ARE_TRUE, |_, state| (0..JOBS).all(|job| state.memory.note_lost[job] || record_is_true(state, job))),
    ];
    let mut properties: Vec<_> = always.into_iter().map(|(name, check)| Property::always(name, check)).collect();
    properties.push(Property::eventually(ALL_END, |_, state: &State| {
        state.budget.failovers == 0 && (0..JOBS).all(|job| state.memory.enqueue_lost[job] || has_ended(state, job))
    }));
    properties
}

/// What does not hold over every failover.
pub fn broken_by_failovers() -> Vec<Property<Protocol>> {
    vec![
        Property::always(ONE_EFFECT_ALWAYS, |_, state: &State| (0..JOBS).all(|job| state.effects(job) <= 1)),
        Property::always(NONE_IS_LOST_EVER, |_, state: &State| (0..JOBS).all(|job| has_one_place(state, job))),
    ]
}

fn has_ended(state: &State, job: usize) -> bool {
    state.memory.acknowledged[job] && state.redis.job(job).is_some_and(|job| job.status.is_final())
}

fn has_one_place(state: &State, job: usize) -> bool {
    let redis = &state.redis;
    let Some(hash) = redis.job(job) else { return !state.memory.acknowledged[job] };
    let queued = redis.queues.iter().map(|queue| queue.count(job)).sum::<usize>();
    let places = [redis.claims[job].is_some(), redis.due[job], hash.status.is_final()];
    queued + places.into_iter().filter(|stands| *stands).count() == 1
}

fn leaks(state: &State) -> bool {
    state.workers.iter().filter(|worker| worker.alive && !worker.take_open).any(|worker| {
        state
            .redis
            .work(worker.session)
            .any(|(job, claim)| worker.attempt.is_none_or(|attempt| (attempt.job, attempt.fence) != (job, claim.fence)))
    })
}

fn record_is_true(state: &State, job: usize) -> bool {
    match state.redis.job(job).map(|job| job.status) {
        Some(Status::Done) => state.effects(job) == 1,
        Some(Status::Failed | Status::Cancelled) => state.effects(job) == 0,
        _ => true,
    }
}

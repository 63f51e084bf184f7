//! What is done to a session on purpose, each thing with what must come of it. The path is good but for that.
//!
//! Read first: [`ALL`], then [`last`].

use std::time::Duration;

use backhaul_agent::connection::Session;
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::store::log::MachineId;
use backhaul_protocol::wire::message::{CloseCode, Reason};
use backhaul_receiver::access;
use backhaul_receiver::server::InUse;
use backhaul_receiver::store::Verb;
use backhaul_receiver::store::fault::{Fault, When};
use backhaul_seams::clock;
use backhaul_simulation::packets::Path;
use backhaul_transport::control;
use backhaul_transport::endpoint::{Endpoint, IDLE_TIMEOUT, Serving, Windows};
use backhaul_transport::link::QuicLink;
use backhaul_transport::tls::{ReceiverTrust, client_config, server_config};
use backhaul_transport::tuning::Tuning;
use tokio::time::{Instant, sleep};

use crate::site::{Attempt, RECEIVER, Site, refusal};

/// A second, of which so many.
const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// An attempt that reaches nobody ends after the idle timeout of its first packets; a second is for its end.
const NOBODY: Duration = seconds(IDLE_TIMEOUT.as_secs() + 1);
/// How long an agent waits for an answer, with a little more.
const PATIENCE: Duration = seconds(125);
/// A point on a path that works, with nothing in its way.
const SOON: Duration = seconds(5);
/// Until a session is over whose agent was killed while it waited for the store: the idle timeout, a minute for what is
/// under way, and what ending may take.
const FORGOTTEN: Duration = seconds(IDLE_TIMEOUT.as_secs() + 60 + 5 + 5 + 2 + 1);

/// The scenarios that leave an agent which may go on.
pub const SCENARIOS: usize = 12;

/// Does one of them.
pub async fn scenario(number: usize, site: &mut Site) {
    match number {
        0 => nobody_answers(site).await,
        1 => away_for_a_while(site).await,
        2 => idle(site).await,
        3 => started_again(site).await,
        4 => strangers_that_say_nothing(site).await,
        5 => a_receiver_that_says_nothing(site).await,
        6 => a_slow_store(site).await,
        7 => gone_while_the_store_hangs(site).await,
        8 => resumed(site).await,
        9 => taken_over(site).await,
        10 => taken_over_while_it_opens(site).await,
        _ => stopped_while_committing(site).await,
    }
    site.is_right().await;
}

/// I14: an attempt that reaches nobody ends soon, and helps no longer than that.
async fn nobody_answers(site: &mut Site) {
    site.packets.mute(RECEIVER.into(), true);
    let began = Instant::now();
    let attempt = site.attempt();
    let error = site.ended(attempt).await.expect_err("nobody is heard");
    let took = began.elapsed();
    assert!(error.is_retryable() && took <= NOBODY, "seed {}: {error} after {took:?} (I14)", site.seed);
    site.packets.mute(RECEIVER.into(), false);
    site.committed_within(SOON, "everybody is heard again").await;
}

/// Who comes back while somebody tries to reach it is found at once.
async fn away_for_a_while(site: &mut Site) {
    site.packets.mute(RECEIVER.into(), true);
    let away = site.chance.millis(7500, 15_000);
    let attempt = site.attempt();
    sleep(away).await;
    site.packets.mute(RECEIVER.into(), false);
    let back = Instant::now();
    let ended = site.ended(attempt).await;
    let (seed, took) = (site.seed, back.elapsed());
    assert!(ended.is_ok() && took <= SOON, "seed {seed}: back after {away:?}, found after {took:?}: {ended:?} (I14)");
}

/// A session that has nothing to do stays.
async fn idle(site: &mut Site) {
    let connected = site.connect().await.expect("a path that works");
    let (state, joined) = (site.state(), site.joined());
    let mut session = Session::new(connected);
    for _ in 0..2 {
        site.write();
        let report =
            site.round(&state, &joined).run(&mut session, &mut backhaul_agent::tracker::Tracking::default()).await;
        let report = report.unwrap_or_else(|error| panic!("seed {}: a session that was idle: {error}", site.seed));
        site.is_stored(&report);
        sleep(site.chance.millis(30_000, 300_000)).await;
    }
    assert!(session.link.close_reason().is_none(), "seed {}: an idle session was closed", site.seed);
    session.close().await;
}

/// A receiver that was killed and started again says so at the next packet, which the keep-alive sends.
async fn started_again(site: &mut Site) {
    let connected = site.open().await;
    sleep(site.chance.millis(0, 20_000)).await;
    site.kill();
    site.start().await;
    sleep(seconds(7)).await;
    let seed = site.seed;
    assert!(connected.link.close_reason().is_some(), "seed {seed}: the receiver was started again, and nobody knows");
    site.committed_within(SOON, "the receiver was started again").await;
}

/// I12: who connects and says nothing is thrown out, with a certificate or without one.
async fn strangers_that_say_nothing(site: &mut Site) {
    // Until sessions of agents that were killed before are over.
    sleep(FORGOTTEN).await;
    let state = site.state();
    let (chain, key) = (state.chain().expect("it joined"), state.ensure_key().expect("it joined"));
    let mut silent = Vec::new();
    for is_known in [true, false] {
        let authority = chain.last().cloned().expect("the authority's");
        let own = is_known.then(|| (chain[..1].to_vec(), &key));
        let tls = client_config(ReceiverTrust::Authority(authority), own).expect("good certificates");
        let endpoint = site.endpoint();
        let connection = endpoint.connect(RECEIVER.into(), tls, Windows::BLOCKS).await.expect("a path that works");
        silent.push(QuicLink::connected(endpoint, connection));
    }
    // One that greets, and then does not say what it wants.
    let greeted = silent.pop().expect("two");
    let streams = control::greet(&*greeted).await.expect("a path that works");
    silent.push(greeted);
    sleep(seconds(1)).await;
    let (seed, held) = (site.seed, site.shared().in_use());
    assert_eq!((held.handshakes, held.strangers), (1, 1), "seed {seed}");
    sleep(seconds(12)).await;
    let held = site.shared().in_use();
    assert_eq!(held, InUse::default(), "seed {seed}: who says nothing has a place (I12)");
    assert!(silent.iter().all(|link| link.close_reason().is_some()), "seed {seed}: who says nothing is let in");
    drop(streams);
}

/// I14: a receiver that is there and does not answer is given up, before the greeting and after it.
async fn a_receiver_that_says_nothing(site: &mut Site) {
    site.kill();
    let greets = site.chance.happens(0.5);
    let authority = site.authority();
    let tls = server_config(&authority, authority.issue_receiver(clock::now()).expect("a certificate"));
    let serving =
        Serving { tls: tls.expect("good"), windows: Windows::BLOCKS, reset_key: [1; 32], tuning: Tuning::default() };
    let endpoint = Endpoint::over(site.packets.bind(RECEIVER.into()), Some(serving)).expect("an endpoint");
    let silent = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Some(incoming) = endpoint.accept().await {
            let Ok(connection) = incoming.accept().expect("an agent").await else { continue };
            let link = QuicLink::accepted(connection);
            let streams = if greets { control::welcome(&*link).await.ok() } else { None };
            held.push((link, streams));
        }
    });
    let began = Instant::now();
    let attempt = site.attempt();
    let error = site.ended(attempt).await.expect_err("there is no answer");
    let (seed, took) = (site.seed, began.elapsed());
    assert!(error.is_retryable() && took <= PATIENCE, "seed {seed}, greets {greets}: {error} after {took:?} (I14)");
    silent.abort();
    site.packets.unbind(RECEIVER.into());
    site.start().await;
    site.committed_within(SOON, "another receiver").await;
}

/// A store that takes minutes is waited for, by one attempt; the agent hears of the point when it is one (I3).
async fn a_slow_store(site: &mut Site) {
    site.write();
    let slow = site.chance.millis(140_000, 260_000);
    site.store.add(When::verb(Verb::PutNew).key("/log/").times(1), Fault::Delay(slow));
    let began = Instant::now();
    site.committed_within(slow + SOON, "a slow store").await;
    assert!(began.elapsed() >= slow, "seed {}: told before it was stored (I3)", site.seed);
    site.store.heal();
}

/// Until an attempt waits for a store that hangs, by what the store was asked since `before`.
async fn frozen(site: &Site, before: usize, attempt: &Attempt) {
    while !site.store.trace()[before..].iter().any(|s| s.fault == Some(Fault::FreezeBefore)) {
        assert!(!attempt.is_finished(), "seed {}: what hangs is never asked for", site.seed);
        sleep(Duration::from_millis(20)).await;
    }
}

/// I12: a session whose agent is gone does not wait for the store for ever.
async fn gone_while_the_store_hangs(site: &mut Site) {
    site.write();
    let before = site.store.trace().len();
    site.store.add(When::verb(Verb::PutNew).key("/log/").times(1), Fault::FreezeBefore);
    let attempt = site.attempt();
    frozen(site, before, &attempt).await;
    site.kill_agent(attempt).await;
    sleep(FORGOTTEN).await;
    let held = site.shared().in_use();
    assert_eq!(held, InUse::default(), "seed {}: of a session whose agent is gone (I12)", site.seed);
    site.store.heal();
    site.store.release();
    site.committed_within(SOON, "the store answers again").await;
}

/// I11: what has arrived is not sent again, whoever was killed; and whoever died is not waited for.
async fn resumed(site: &mut Site) {
    let (all, before) = (site.write_all(), site.segments());
    site.packets.set(Path { delay: (20, 30), ..Path::default() });
    let attempt = site.attempt();
    let wanted = site.chance.between(1, all * 2 / 3);
    while site.segments() - before < wanted && !attempt.is_finished() {
        sleep(Duration::from_millis(1)).await;
    }
    let stored = site.segments() - before;
    if site.chance.happens(0.5) {
        site.kill_agent(attempt).await;
    } else {
        site.kill();
        site.start().await;
        let _ = site.ended(attempt).await;
    }
    site.packets.set(Path::default());
    // A session may be at a commit whose records do not come any more; it has five seconds to finish.
    let report = site.committed_within(SOON + seconds(5), "after a kill").await;
    // A tenth of a segment is its index.
    let (seed, sent) = (site.seed, report.bytes_sent);
    let may = all.saturating_sub(stored * 9 / 10);
    assert!(sent <= may, "seed {seed}: {sent} bytes are sent where {stored} of {all} had arrived (I11)");
}

/// I4: of two sessions of one group the newer one writes, at once, and the older one hears of it.
async fn taken_over(site: &mut Site) {
    let older = site.open().await;
    sleep(site.chance.millis(0, 5000)).await;
    site.write();
    site.committed_within(SOON, "a session that takes over").await;
    sleep(seconds(1)).await;
    let (seed, ended) = (site.seed, older.link.close_reason());
    let code = ended.as_ref().and_then(backhaul_transport::error::TransportError::close_code);
    assert_eq!(code, Some(CloseCode::Superseded), "seed {seed}: of the older session: {ended:?} (I4)");
}

/// The same where the older one was killed while its receiver waits for the store to open its round.
async fn taken_over_while_it_opens(site: &mut Site) {
    // One that knows nothing of the group.
    site.kill();
    site.start().await;
    site.write();
    let before = site.store.trace().len();
    site.store.add(When::verb(Verb::List).key("/maps/").times(1), Fault::FreezeBefore);
    let attempt = site.attempt();
    frozen(site, before, &attempt).await;
    site.kill_agent(attempt).await;
    // What is under way has five seconds to finish, twice.
    site.committed_within(SOON + seconds(10), "a session that takes over one that opens").await;
    site.store.heal();
    site.store.release();
}

/// A receiver that is told to stop finishes a commit that is under way.
async fn stopped_while_committing(site: &mut Site) {
    site.write();
    let slow = site.chance.millis(3000, 9000);
    site.store.add(When::verb(Verb::PutNew).key("/log/").times(1), Fault::Delay(slow));
    let attempt = site.attempt();
    sleep(seconds(2)).await;
    let receiver = site.receiver.take().expect("it runs");
    receiver.stop.cancel();
    let ended = site.ended(attempt).await;
    assert!(ended.is_ok(), "seed {}: a commit while the receiver stops: {ended:?}", site.seed);
    let stopped = tokio::time::timeout(SOON, receiver.running).await;
    assert!(stopped.is_ok(), "seed {}: a receiver without sessions does not stop", site.seed);
    site.store.heal();
    site.start().await;
    site.committed_within(SOON, "the receiver was started again").await;
}

/// Refusals come as such, with their own reason, and at once; afterwards this agent may not be able to go on.
pub async fn last(site: &mut Site) {
    let delay = site.chance.pick(&[(1, 3), (40, 60)]);
    site.packets.set(Path { loss: site.chance.pick(&[0.0, 2.0]), delay, ..Path::default() });
    match site.chance.below(5) {
        0 => {
            site.join(AgentRole::RestoreOnly).await;
            refused(site, Reason::Denied).await;
        }
        1 => {
            site.machine = MachineId([9; 32]);
            refused(site, Reason::Diverged).await;
        }
        2 => {
            let (agent, now) = (site.joined().agent, clock::now());
            access::revoke(&site.catalog().await, agent, now).await.expect("the store works");
            refused(site, Reason::Authentication).await;
        }
        3 => {
            let mut others = Vec::new();
            for _ in 0..8 {
                others.push(site.connect().await.expect("a path that works"));
            }
            // Whose last packet of the handshake is lost comes later.
            for _ in 0..100 {
                if site.shared().in_use().sessions == others.len() {
                    break;
                }
                sleep(Duration::from_millis(100)).await;
            }
            refused(site, Reason::Busy).await;
            for other in others {
                other.link.goodbye().await;
            }
            sleep(seconds(3)).await;
            site.packets.set(Path::default());
            site.committed_within(SOON, "there is room again").await;
        }
        _ => revoked_while_open(site).await,
    }
}

async fn refused(site: &mut Site, reason: Reason) {
    let began = Instant::now();
    let attempt = site.attempt();
    let error = site.ended(attempt).await.expect_err("it may not write");
    let (seed, took) = (site.seed, began.elapsed());
    let said = refusal(&error).unwrap_or_else(|| panic!("seed {seed}: no refusal: {error:?}"));
    assert_eq!(said.reason, reason, "seed {seed}: {said}");
    assert_eq!(error.is_retryable(), reason == Reason::Busy, "seed {seed}: {said}");
    assert!(took < SOON, "seed {seed}: refused after {took:?}");
}

/// I17: who is revoked is thrown out within 30 s.
async fn revoked_while_open(site: &mut Site) {
    // Where the goodbye is lost nobody can tell why it was said.
    site.packets.set(Path::default());
    let open = site.open().await;
    let (agent, now) = (site.joined().agent, clock::now());
    access::revoke(&site.catalog().await, agent, now).await.expect("the store works");
    sleep(seconds(30)).await;
    let (seed, ended) = (site.seed, open.link.close_reason());
    let code = ended.as_ref().and_then(backhaul_transport::error::TransportError::close_code);
    assert_eq!(code, Some(CloseCode::Revoked), "seed {seed}: {ended:?} (I17)");
}

/// I12: when all sessions are over nothing is left of them, and when the receiver stops no task is.
pub async fn nothing_is_left(mut site: Site) {
    site.packets.set(Path::default());
    // Those whose agents were killed, or who can't hear each other, are over by now.
    sleep(FORGOTTEN).await;
    let (seed, held) = (site.seed, site.shared().in_use());
    assert_eq!(held, InUse::default(), "seed {seed}: all sessions are over (I12)");
    let receiver = site.receiver.take().expect("it runs");
    receiver.stop.cancel();
    let stopped = tokio::time::timeout(SOON, receiver.running).await;
    assert!(stopped.is_ok(), "seed {seed}: a receiver without sessions does not stop");
    drop((receiver.shared, site));
    sleep(seconds(60)).await;
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert_eq!(tasks, 0, "seed {seed}: tasks are left");
}

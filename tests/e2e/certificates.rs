//! Certificates are renewed in time, also on a session that lasts, and for a while after their end (A2, F33).

use std::time::{Duration, SystemTime};

use backhaul_agent::state::StateDir;
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_tests::fixture::Serving;
use backhaul_tests::process::until;
use backhaul_tests::{Agent, Fixture, Random, image};
use backhaul_transport::authority::{AGENT_LIFE, Authority, RENEWAL_GRACE};
use backhaul_transport::tls::agent_identity;

const DAY: Duration = Duration::from_secs(86_400);

fn setup() -> (Fixture, Serving, Agent) {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk.img"), 1 << 20, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    agent.sync();
    (f, serving, agent)
}

/// The agent's certificate becomes one that was issued so long ago.
fn issued(f: &Fixture, agent: &Agent, ago: Duration) {
    let read = |name: &str| std::fs::read_to_string(f.receiver_state().join(name)).expect("init made it");
    let authority = Authority::from_pem(&read("authority.pem"), &read("authority.key")).expect("usable");
    let state = StateDir::new(&agent.state);
    let joined = state.expect_joined().expect("it joined");
    let request = state.ensure_key().expect("a key").request().expect("a request");
    let then = SystemTime::now() - ago;
    let issued = authority.issue_agent(&request, joined.agent, joined.group, AgentRole::Writer, then);
    let chain: Vec<Vec<u8>> = issued.expect("its own key").0.iter().map(|c| c.to_vec()).collect();
    state.write_chain(&chain).expect("there is room");
}

/// How long it is good, milliseconds.
fn left(agent: &Agent) -> i64 {
    let chain = StateDir::new(&agent.state).chain().expect("readable");
    let now = backhaul_agent::connection::unix_millis().0;
    agent_identity(&chain[0]).expect("an agent's").not_after.0 - now
}

#[test]
fn a_certificate_is_renewed_when_two_thirds_of_its_life_are_over() {
    let (f, _serving, agent) = setup();
    issued(&f, &agent, AGENT_LIFE / 3);
    let before = left(&agent);
    agent.sync();
    assert!(left(&agent) <= before, "not before its time");
    issued(&f, &agent, AGENT_LIFE * 2 / 3 + DAY);
    agent.sync();
    assert!(left(&agent) > (AGENT_LIFE - DAY).as_millis() as i64, "{} ms are left", left(&agent));
    assert_eq!(f.points().len(), 3);
}

#[test]
fn a_certificate_that_ended_is_renewed_for_a_while_and_then_no_more() {
    let (f, _serving, agent) = setup();
    issued(&f, &agent, AGENT_LIFE + DAY);
    assert!(left(&agent) < 0);
    agent.sync();
    assert!(left(&agent) > 0);
    issued(&f, &agent, AGENT_LIFE + RENEWAL_GRACE + DAY);
    agent.run(&["sync"]).fails(12, "E_AUTH");
    assert!(left(&agent) < 0, "nothing was renewed");
    // Nor is one renewed whose agent was revoked.
    issued(&f, &agent, AGENT_LIFE + DAY);
    f.receiver(&["revoke", &agent.id()]).ok();
    agent.run(&["sync"]).fails(12, "E_AUTH");
    assert!(left(&agent) < 0 && f.points().len() == 2);
}

/// A service whose certificate ends while it is connected.
#[test]
fn a_session_outlives_the_certificate_that_it_began_with() {
    let (f, serving, agent) = setup();
    issued(&f, &agent, AGENT_LIFE - Duration::from_secs(6));
    let mut running = agent.start(&["run", "--every", "1s"]);
    until("renewed", Duration::from_secs(20), || left(&agent) > DAY.as_millis() as i64);
    std::thread::sleep(Duration::from_secs(8));
    let points = f.points().len();
    image::write(&f.path("disk.img"), 5, b"after its end");
    until("a point after its end", Duration::from_secs(10), || f.points().len() > points);
    assert!(running.is_running() && !serving.child.err().contains("has expired"), "{}", serving.child.err());
}

//! Volumes that are large beside their data: memory does not grow with them (I12).

use std::fs::File;

use backhaul_tests::fixture::number;
use backhaul_tests::memory::Sampler;
use backhaul_tests::{Fixture, Random, image};

const MIB: u64 = 1 << 20;

/// One thread sends the data; what others find behind it must wait.
#[test]
fn data_before_terabytes_of_nothing_takes_bounded_memory() {
    let fixture = Fixture::new();
    let serving = fixture.serve();
    let agent = fixture.joined("a", &serving);
    let path = fixture.path("large.img");
    image::random(&path, 256 * MIB, &mut Random::new(1));
    let file = File::options().write(true).open(&path).expect("just made");
    file.set_len(4 << 40).expect("a sparse file");
    agent.protect("large", &path);
    let mut sync = agent.start(&["sync"]);
    let (of_agent, of_receiver) = (Sampler::start(sync.pid()), Sampler::start(serving.child.pid()));
    let done = sync.wait(std::time::Duration::from_secs(120));
    let peak = |sampler: &Sampler| sampler.seen().into_iter().map(|(_, bytes)| bytes).max().unwrap_or(0);
    let peaks = [&of_agent, &of_receiver].map(peak);
    assert!(done.success(), "{done:?}");
    assert!(number(&agent.sync(), "bytes_sent") < MIB, "nothing changed");
    assert!(peaks[0] < 128 * MIB && peaks[1] < 192 * MIB, "{peaks:?}");
    assert!(peaks.iter().all(|p| *p > 4 * MIB), "they were looked at: {peaks:?}");
}

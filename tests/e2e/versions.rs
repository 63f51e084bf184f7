//! Objects of a version that is not known yet, through the programs: said so, and nothing changed (I21).

use std::path::PathBuf;

use backhaul_protocol::store::envelope::ENVELOPE_LEN;
use backhaul_tests::fixture::GROUP;
use backhaul_tests::{Fixture, Ran, Random, image};

/// The object as a later version would have written it: right in everything but its version, or its features.
fn later(object: &[u8], at: usize) -> Vec<u8> {
    let mut twin = object.to_vec();
    twin[at] += 1;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&twin[..32]).update(&twin[ENVELOPE_LEN..]);
    twin[32..ENVELOPE_LEN].copy_from_slice(hasher.finalize().as_bytes());
    twin
}

const VERSION: usize = 10;
const FEATURES: usize = 12;

#[test]
fn every_command_says_that_the_store_was_written_by_a_newer_version() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    image::random(&disk, 3 << 20, &mut Random::new(1));
    agent.protect("data", &disk);
    // Enough points that one of them has maps.
    for i in 0..66 {
        image::write(&disk, i * 40_000, &i.to_le_bytes());
        agent.sync();
    }
    let id = agent.id();
    serving.stop();
    let to = f.path("to.img");
    let to_text = to.to_str().expect("UTF-8").to_owned();
    let newest = f.objects_with("/log/").pop().expect("there are points");
    // Segments are not among them: what points to one holds its index and the digest of each block of it.
    let any_map = f.objects_with("/maps/").pop().expect("it folded");
    let agents = format!("/agents/{}", id.replace('-', ""));
    let agent_object = f.objects_with(&agents).pop().unwrap_or_else(|| f.objects_with("/agents/").remove(0));
    let name = f.objects_with("names/").pop().unwrap_or_else(|| panic!("{:?}", f.objects().keys()));
    let verify = |point: &str| vec!["verify".to_owned(), format!("{GROUP}@{point}")];
    let restore =
        |point: &str| ["restore", &format!("{GROUP}/data@{point}"), "--to", &to_text].map(str::to_owned).to_vec();
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let cases: Vec<(PathBuf, Vec<Vec<String>>, bool)> = vec![
        (
            f.store_path().join("format"),
            vec![words("points"), words("agents"), verify("1"), restore("1"), words(&format!("adopt {GROUP} {id}"))],
            false,
        ),
        (newest, vec![words("points"), verify("66"), restore("66"), words(&format!("adopt {GROUP} {id}"))], true),
        // The log tells the name too: what only reads goes on without this object.
        (name, vec![verify("1")], false),
        (any_map, vec![verify("66"), restore("66")], false),
        (agent_object, vec![words("agents")], true),
    ];
    for (path, commands, syncs_fail) in cases {
        let bytes = std::fs::read(&path).expect("it is there");
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
        for (at, word) in [(VERSION, "version"), (FEATURES, "version")] {
            std::fs::write(&path, later(&bytes, at)).expect("there is room");
            let before = f.objects();
            for command in &commands {
                let ran = f.receiver(&command.iter().map(String::as_str).collect::<Vec<_>>());
                said(&ran, word, &path.display().to_string());
            }
            if syncs_fail {
                let serving = f.serve();
                let ran = agent.clone().through(&serving.address()).run(&["sync"]);
                said(&ran, word, &path.display().to_string());
                serving.stop();
            }
            let objects = |all: &std::collections::BTreeMap<String, u64>| {
                all.keys().filter(|k| !k.contains("seen")).cloned().collect::<Vec<_>>()
            };
            assert_eq!(objects(&f.objects()), objects(&before), "{}: something was written", path.display());
            assert!(!to.exists(), "{}: something was restored", path.display());
        }
        std::fs::write(&path, &bytes).expect("there is room");
    }
    f.receiver(&["verify"]).ok();
}

fn said(ran: &Ran, word: &str, what: &str) {
    assert_eq!(ran.code, Some(6), "{what}: {ran:#?}");
    assert!(ran.out.contains(word) && !ran.err.contains("panicked"), "{what}: {ran:#?}");
}

//! Writes by every path, each in a point soon after: what is restored is what the device holds, byte by byte.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use backhaul_tests::process::{tool, until};
use backhaul_tests::{Random, image, needs_root};
use rustix::fs::{FallocateFlags, OFlags, fallocate};

use crate::server::{Kind, PROMPT, Server};

/// Changes one file, each time in another way.
fn change(file: &Path, way: u64, random: &mut Random) {
    let open = |flags: OFlags| {
        let flags = flags.bits() as i32;
        File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(file)
            .expect("opens")
    };
    let at = random.between(0, 2 << 20);
    let len = random.between(1, 300_000) as usize;
    match way {
        0 => open(OFlags::empty()).write_all_at(&random.bytes(len), at),
        1 => open(OFlags::DSYNC).write_all_at(&random.bytes(len), at),
        2 => {
            let mut page = backhaul_volume::buffer::AlignedBuffer::new(65536);
            page.copy_from_slice(&random.bytes(65536));
            open(OFlags::DIRECT).write_all_at(&page, at / 4096 * 4096)
        }
        3 => open(OFlags::empty()).set_len(at),
        4 => fallocate(open(OFlags::empty()), FallocateFlags::empty(), at, len as u64).map_err(Into::into),
        5 => fallocate(
            open(OFlags::empty()),
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            at / 4096 * 4096,
            65536,
        )
        .map_err(Into::into),
        _ => {
            let script = "import mmap,os,sys; f=os.open(sys.argv[1],os.O_RDWR|os.O_CREAT); os.ftruncate(f,200000); \
                          m=mmap.mmap(f,200000); m[100:100+40000]=os.urandom(40000)";
            tool("python3", ["-c", script, file.to_str().expect("UTF-8")]);
            Ok(())
        }
    }
    .expect("it is written");
}

#[test]
fn what_is_restored_is_what_the_device_holds() {
    let test = "paths::what_is_restored_is_what_the_device_holds";
    if !needs_root(test) {
        return;
    }
    let mut random = Random::printed(test);
    let mut server = Server::new(Kind::Ext4, 1);
    let mut running = server.run();
    until("the first point", PROMPT, || !server.fixture.points().is_empty());
    let folder = server.mounted(0);
    for round in 0..9 {
        for _ in 0..random.between(1, 6) {
            let file = folder.join(format!("f{}", random.between(0, 4)));
            change(&file, random.between(0, 7), &mut random);
        }
        if round == 6 {
            std::fs::remove_file(folder.join("f1")).ok();
            tool("fstrim", [&folder]);
        }
        server.wait_for_point();
        // What was frozen differs from what lies there only by what freezing itself wrote.
        let point = server.fixture.points().last().map(|p| p["point"].as_u64().expect("a number")).expect("a point");
        let restored = server.restored("a", point);
        let mounted = backhaul_tests::device::Mount::new(
            backhaul_tests::device::Loop::attach(&restored).path(),
            &server.fixture.path("restored-mount"),
        );
        for entry in std::fs::read_dir(&folder).expect("it is mounted") {
            let name = entry.expect("an entry").file_name();
            if name != "lost+found" {
                let [now, then] = [&folder, mounted.path()].map(|f| std::fs::read(f.join(&name)).expect("a file"));
                assert!(now == then, "{name:?} differs in point {point}");
            }
        }
        tool("umount", [mounted.path()]);
    }
    // Nothing is mounted: the device itself.
    server.unmount();
    server.wait_for_point();
    running.signal(rustix::process::Signal::TERM);
    assert_eq!(running.wait(PROMPT).code(), Some(0), "{}", running.err());
    let points = server.fixture.points();
    let newest = points.last().expect("a point");
    assert_eq!(newest["volumes"][0]["digest"], image::digest(server.disks[0].device.path(), 65536));
    assert!(points.len() > 9 && newest["consistency"] == "crash", "{newest}");
}

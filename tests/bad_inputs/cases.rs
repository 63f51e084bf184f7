//! The table. Read [`all`]: what is wrong, the exit code, the message id, and how it is done.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use backhaul_tests::process::Ran;
use backhaul_tests::s3::BUCKET;

use crate::world::Shared;

/// One line of the table.
pub struct Case {
    pub what: String,
    pub exit: i32,
    pub id: &'static str,
    pub run: Box<dyn Fn(&Shared) -> Ran + Send + Sync>,
}

struct Table(Vec<Case>);

impl Table {
    fn add(
        &mut self,
        what: impl Into<String>,
        exit: i32,
        id: &'static str,
        run: impl Fn(&Shared) -> Ran + Send + Sync + 'static,
    ) {
        self.0.push(Case { what: what.into(), exit, id, run: Box::new(run) });
    }
}

pub fn all() -> Vec<Case> {
    let mut table = Table(Vec::new());
    agent_usage(&mut table);
    tokens(&mut table);
    agent_settings(&mut table);
    agent_state(&mut table);
    sources(&mut table);
    network_restore(&mut table);
    receiver_usage(&mut table);
    receiver_settings(&mut table);
    not_there(&mut table);
    targets(&mut table);
    stores(&mut table);
    buckets(&mut table);
    damaged_stores(&mut table);
    receiver_state(&mut table);
    table.0
}

fn agent_usage(t: &mut Table) {
    let long = "a".repeat(64);
    let long: &'static str = Box::leak(format!("{long}=/x").into_boxed_str());
    let lines: Vec<(&str, Vec<&'static str>)> = vec![
        ("no command", vec![]),
        ("an unknown command", vec!["backup"]),
        ("an unknown flag", vec!["sync", "--fast"]),
        ("words too many", vec!["sync", "data"]),
        ("quiet and verbose", vec!["sync", "-q", "-v"]),
        ("a settings flag without a value", vec!["sync", "--config"]),
        ("protect nothing", vec!["protect"]),
        ("protect without a path", vec!["protect", "data"]),
        ("protect with an empty path", vec!["protect", "data="]),
        ("a volume without a name", vec!["protect", "=/dev/sda"]),
        ("a volume with a capital", vec!["protect", "Data=/dev/sda"]),
        ("a volume named ..", vec!["protect", "..=/dev/sda"]),
        ("a volume with a slash", vec!["protect", "a/b=/dev/sda"]),
        ("a volume with a space", vec!["protect", "a b=/dev/sda"]),
        ("a volume with an umlaut", vec!["protect", "\u{fc}=/dev/sda"]),
        ("a volume with a line break", vec!["protect", "a\nb=/dev/sda"]),
        ("a name of 64 letters", vec!["protect", long]),
        ("unprotect a bad name", vec!["unprotect", "../x"]),
        ("an interval of no unit", vec!["run", "--every", "15"]),
        ("an interval of another unit", vec!["run", "--every", "5parsecs"]),
        ("an interval below zero", vec!["run", "--every", "-5s"]),
        ("an interval without end", vec!["run", "--every", "1e99s"]),
        ("an interval of a week and more", vec!["run", "--every", "8d"]),
        ("an interval of nothing", vec!["run", "--every", "0s"]),
        ("a lag that is no time", vec!["status", "--check", "--max-lag", "soon"]),
        ("join without a token", vec!["join"]),
        ("join with two tokens", vec!["join", "x", "--token-file", "y"]),
        ("a token for all to see", vec!["join", "bh1.abc"]),
        ("a token file that is not there", vec!["join", "--token-file", "/nonexistent/token"]),
        ("restore to nowhere", vec!["restore", "data"]),
        ("restore a point of no number", vec!["restore", "data@yesterday-ish", "--to", "/x"]),
        ("restore of two points", vec!["restore", "data@1@2", "--to", "/x"]),
        ("restore read back in no known way", vec!["restore", "data", "--to", "/x", "--verify", "maybe"]),
    ];
    for (what, args) in lines {
        t.add(format!("agent: {what}"), 2, "E_USAGE", move |w| w.stranger(&args));
    }
}

fn tokens(t: &mut Table) {
    t.add("token: nothing", 12, "E_AUTH", |w| w.joins_with(""));
    t.add("token: noise", 12, "E_AUTH", |w| w.joins_with("\u{1b}[31m%s%n\\x00"));
    t.add("token: too long by far", 12, "E_AUTH", |w| w.joins_with(&"bh1.".repeat(5000)));
    t.add("token: cut", 12, "E_AUTH", |w| w.joins_with(&w.unknown[..w.unknown.len() / 2]));
    t.add("token: of a later kind", 12, "E_AUTH", |w| w.joins_with(&w.unknown.replacen("bh1", "bh9", 1)));
    t.add("token: twice on one line", 12, "E_AUTH", |w| w.joins_with(&format!("{0}{0}", w.unknown)));
    t.add("token: never made here", 12, "E_AUTH", |w| w.joins_with(&w.unknown));
    t.add("token: used by another server", 12, "E_AUTH", |w| w.joins_with(&w.used));
    t.add("token: expired", 12, "E_AUTH", |w| w.joins_with(&w.expired));
    t.add("token: of another receiver", 12, "E_AUTH", |w| w.joins_with(&w.foreign));
    t.add("token: for an agent that has joined", 4, "E_JOINED", |w| w.agent.join(&w.unknown));
    t.add("token: a file of noise", 12, "E_AUTH", |w| w.stranger(&["join", "--token-file", &w.path("file")]));
    t.add("token: a folder", 2, "E_USAGE", |w| w.stranger(&["join", "--token-file", &w.path("folder")]));
    t.add("token: a file of no text", 2, "E_USAGE", |w| w.stranger(&["join", "--token-file", &w.path("disk.img")]));
    for command in [
        &["sync"][..],
        &["run"],
        &["status"],
        &["restore", "data", "--to", "/x"],
        &["protect", "a=/x"],
        &["unprotect", "a"],
    ] {
        t.add(format!("not joined: {}", command[0]), 78, "E_NOT_JOINED", move |w| w.stranger(command));
    }
    t.add("a restore-only agent: sync", 12, "E_DENIED", |w| w.reader.run(&["sync"]));
    t.add("a restore-only agent: protect", 12, "E_DENIED", |w| w.reader.run(&["protect", "a=/x"]));
}

fn agent_settings(t: &mut Table) {
    for bad in [
        "no_such_key = 1",
        "threads = 0",
        "threads = -1",
        "threads = 1e99",
        "threads = 100000",
        "threads = \"two\"",
        "compression = 99",
        "compression = \"lz4\"",
        "congestion = \"reno\"",
        "congestion = 1",
        "segmentation_offload = \"yes\"",
        "block_size = \"1000\"",
        "block_size = \"4KiB\"",
        "block_size = \"2MiB\"",
        "block_size = \"-64KiB\"",
        "block_size = \"99999999999TiB\"",
        "every = \"0s\"",
        "every = \"1e99s\"",
        "every = 15",
        "receiver = \"nowhere\"",
        "receiver = \"::1:4433\"",
        "state = 5",
        "threads = ",
        "[table]",
        "threads = 1\nthreads = 1",
        "\u{0}",
    ] {
        t.add(format!("agent settings: {}", bad.escape_debug()), 78, "E_CONFIG", move |w| w.agent_with(bad, &["sync"]));
    }
    t.add("agent settings: not there", 78, "E_CONFIG", |w| {
        w.f.agent(&w.fresh("set")).with_config("/nonexistent").run(&["sync"])
    });
    t.add("agent settings: a folder", 78, "E_CONFIG", |w| {
        w.f.agent(&w.fresh("set")).with_config(&w.path("folder")).run(&["sync"])
    });
    t.add("agent settings: no text", 78, "E_CONFIG", |w| {
        w.f.agent(&w.fresh("set")).with_config(&w.path("disk.img")).run(&["sync"])
    });
    t.add("agent settings: a machine id that is not there", 78, "E_CONFIG", |w| {
        let agent = w.f.agent(&w.fresh("set"));
        std::fs::write(agent.config_file(), "machine_id_file = \"/nonexistent/id\"").unwrap();
        agent.with_state(&w.agent.state).run(&["sync"])
    });
}

fn put(name: &'static str, bytes: &'static [u8]) -> impl Fn(&Path) + Copy {
    move |state: &Path| std::fs::write(state.join(name), bytes).unwrap()
}

fn agent_state(t: &mut Table) {
    for name in ["identity.json", "volumes.json", "writer.json", "agent.crt", "agent.key"] {
        for (what, bytes) in [("empty", &b""[..]), ("noise", b"\xff\xfe\x00"), ("another's", b"{\"x\": 1}")] {
            t.add(format!("agent state: {name} is {what}"), 78, "E_STATE_DIR", move |w| {
                w.agent_after(put(name, bytes), &["sync"])
            });
        }
    }
    t.add("agent state: no key", 78, "E_STATE_DIR", |w| {
        w.agent_after(|state| std::fs::remove_file(state.join("agent.key")).unwrap(), &["sync"])
    });
    t.add("agent state: a file", 78, "E_STATE_DIR", |w| {
        w.f.agent(&w.fresh("set")).with_state(&w.f.path("file")).join(&w.unknown)
    });
    t.add("agent state: below a file", 78, "E_STATE_DIR", |w| {
        w.f.agent(&w.fresh("set")).with_state(&w.f.path("file").join("state")).join(&w.unknown)
    });
}

fn sources(t: &mut Table) {
    let protect = |w: &Shared, path: &str| w.agent_after(|_| (), &["protect", &format!("more={path}")]);
    t.add("source: not there", 10, "E_SOURCE", move |w| protect(w, &w.path("missing")));
    t.add("source: a folder", 4, "E_SOURCE", move |w| protect(w, &w.path("folder")));
    t.add("source: a character device", 4, "E_SOURCE", move |w| protect(w, "/dev/null"));
    t.add("source: protected already", 2, "E_VOLUME", move |w| protect(w, &w.path("disk.img")));
    t.add("source: empty", 4, "E_SOURCE", move |w| {
        let path = w.path(&w.fresh("empty"));
        std::fs::write(&path, "").unwrap();
        protect(w, &path)
    });
    t.add("source: below a file", 1, "E_SOURCE", move |w| protect(w, &w.path("file/x")));
    t.add("source: a socket", 4, "E_SOURCE", move |w| {
        let path = w.f.path(&w.fresh("socket"));
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        protect(w, &path.display().to_string())
    });
    t.add("source: two of one name", 2, "E_VOLUME", |w| {
        let image = w.path("disk.img");
        w.agent_after(|_| (), &["protect", &format!("x={image}"), &format!("x={image}")])
    });
    t.add("source: unprotect what is not protected", 10, "E_NOTFOUND", |w| {
        w.agent_after(|_| (), &["unprotect", "more"])
    });
}

fn network_restore(t: &mut Table) {
    fn restore(w: &Shared, what: &'static str, to: &str) -> Ran {
        w.reader.run(&["restore", what, "--to", to, "--verify", "cached"])
    }
    t.add("network restore: no such volume", 10, "E_NOTFOUND", |w| restore(w, "other", &w.path(&w.fresh("to"))));
    t.add("network restore: no such point", 10, "E_NOTFOUND", |w| restore(w, "data@99", &w.path(&w.fresh("to"))));
    t.add("network restore: a point of the log that is none", 10, "E_NOTFOUND", |w| {
        restore(w, "data@0", &w.path(&w.fresh("to")))
    });
    t.add("network restore: before the first point", 10, "E_NOTFOUND", |w| {
        restore(w, "data@1971-01-01", &w.path(&w.fresh("to")))
    });
    t.add("network restore: to a folder", 4, "E_TARGET", |w| restore(w, "data", &w.path("folder")));
    t.add("network restore: into no folder", 10, "E_TARGET", |w| restore(w, "data", &w.path("missing/to")));
    t.add("network restore: onto what is protected", 4, "E_TARGET", |w| {
        w.agent_after(|_| (), &["restore", "data", "--to", &w.path("disk.img")])
    });
    t.add("network restore: to a name that is not there", 2, "E_USAGE", |w| {
        restore(w, "data", &format!("x={}", w.path("to")))
    });
    t.add("network: nobody there", 13, "E_NETWORK", |w| {
        w.agent_after(|_| (), &["restore", "data", "--to", &w.path("to"), "--receiver", "127.0.0.1:1"])
    });
    t.add("network: no such host", 13, "E_NETWORK", |w| {
        w.agent_after(|_| (), &["restore", "data", "--to", &w.path("to"), "--receiver", "no-such-host.invalid:1"])
    });
    t.add("network: an address of no port", 78, "E_CONFIG", |w| w.agent_after(|_| (), &["sync", "--receiver", "host"]));
}

fn receiver_usage(t: &mut Table) {
    let lines: Vec<(&str, Vec<&'static str>)> = vec![
        ("no command", vec![]),
        ("an unknown command", vec!["prune"]),
        ("an unknown flag", vec!["points", "--all"]),
        ("a group with a capital", vec!["points", "Web"]),
        ("a group named ..", vec!["points", ".."]),
        ("a group of nothing", vec!["points", ""]),
        ("restore of nothing", vec!["restore", "--to", "/x"]),
        ("restore to nowhere", vec!["restore", "web"]),
        ("restore of a path", vec!["restore", "web/data/x", "--to", "/x"]),
        ("restore of a point of no number", vec!["restore", "web@-1", "--to", "/x"]),
        ("restore of a number too large", vec!["restore", "web@99999999999999999999", "--to", "/x"]),
        ("verify of more than all", vec!["verify", "--read-data", "101%"]),
        ("verify of less than nothing", vec!["verify", "--read-data=-1%"]),
        ("verify of no number", vec!["verify", "--read-data", "NaN"]),
        ("a token for no group", vec!["token"]),
        ("a token without an address", vec!["token", "--group", "web"]),
        ("a token with a URL", vec!["token", "--group", "web", "--address", "https://a:1"]),
        ("a token to port 0", vec!["token", "--group", "web", "--address", "a:0"]),
        ("a token for no time", vec!["token", "--group", "web", "--address", "a:1", "--ttl", "0s"]),
        ("a token for a month", vec!["token", "--group", "web", "--address", "a:1", "--ttl", "30d"]),
        (
            "a token for a name too long",
            vec!["token", "--address", "a:1", "--group", Box::leak("g".repeat(64).into_boxed_str())],
        ),
        ("revoke who is no id", vec!["revoke", "web1"]),
        ("adopt who is no id", vec!["adopt", "web", "7"]),
        ("listen nowhere", vec!["serve", "--listen", "nowhere"]),
        ("listen on port 99999", vec!["serve", "--listen", "127.0.0.1:99999"]),
    ];
    for (what, args) in lines {
        t.add(format!("receiver: {what}"), 2, "E_USAGE", move |w| w.f.receiver(&args));
    }
    t.add("receiver: no store", 2, "E_USAGE", |w| w.receiver_with("", &["points"]));
}

fn receiver_settings(t: &mut Table) {
    for bad in [
        "no_such_key = 1",
        "memory = \"1KiB\"",
        "memory = \"-1\"",
        "memory = 5",
        "segment_size = \"65MiB\"",
        "segment_size = \"1\"",
        "memory = \"16MiB\"\nsegment_size = \"16MiB\"",
        "max_sessions = 0",
        "max_sessions = -1",
        "congestion = \"reno\"",
        "segmentation_offload = 1",
        "listen = \"nowhere\"",
        "listen = \"1.2.3.4:99999\"",
        "store = \"ftp://x/y\"",
        "store = \"\"",
        "advertise = \"dr.example.com:0\"",
        "\u{0}",
    ] {
        t.add(format!("receiver settings: {}", bad.escape_debug()), 78, "E_CONFIG", move |w| {
            w.receiver_with(bad, &["points"])
        });
    }
}

fn not_there(t: &mut Table) {
    let lines: Vec<(&str, Vec<&'static str>)> = vec![
        ("points of no group", vec!["points", "other"]),
        ("verify no group", vec!["verify", "other"]),
        ("verify no volume", vec!["verify", "web/other"]),
        ("verify no point", vec!["verify", "web@99"]),
        ("restore of no group", vec!["restore", "other", "--to", "/nonexistent/x"]),
        ("restore of no volume", vec!["restore", "web/other", "--to", "/nonexistent/x"]),
        ("restore of no point", vec!["restore", "web@99", "--to", "/nonexistent/x"]),
        ("restore of the log's first record", vec!["restore", "web@0", "--to", "/nonexistent/x"]),
        ("restore of a time before all points", vec!["restore", "web@1971-01-01", "--to", "/nonexistent/x"]),
        ("revoke nobody", vec!["revoke", "00000000-0000-7000-8000-000000000000"]),
        ("adopt nobody", vec!["adopt", "web", "00000000-0000-7000-8000-000000000000"]),
        ("adopt into no group", vec!["adopt", "other", "00000000-0000-7000-8000-000000000000"]),
    ];
    for (what, args) in lines {
        t.add(format!("not there: {what}"), 10, "E_NOTFOUND", move |w| w.f.receiver(&args));
    }
}

fn targets(t: &mut Table) {
    fn restore(w: &Shared, to: &[&str]) -> Ran {
        w.f.receiver(&[&["restore", "web/data", "--verify", "cached", "--to"], to].concat())
    }
    t.add("target: a folder", 4, "E_TARGET", |w| restore(w, &[&w.path("folder")]));
    t.add("target: in no folder", 10, "E_TARGET", |w| restore(w, &[&w.path("missing/to")]));
    t.add("target: below a file", 10, "E_TARGET", |w| restore(w, &[&w.path("file/to")]));
    t.add("target: a character device", 4, "E_TARGET", |w| restore(w, &["/dev/null"]));
    t.add("target: nothing", 2, "E_USAGE", |w| restore(w, &[""]));
    t.add("target: in the store itself", 4, "E_TARGET", |w| {
        restore(w, &[w.f.store_path().join("to").to_str().unwrap()])
    });
    t.add("target: an object of the store", 4, "E_TARGET", |w| {
        restore(w, &[w.f.store_path().join("format").to_str().unwrap()])
    });
    t.add("target: two for one volume", 2, "E_USAGE", |w| {
        let (one, two) = (w.path(&w.fresh("to")), w.path(&w.fresh("to")));
        restore(w, &[&one, &two])
    });
    t.add("target: for a volume that is none", 2, "E_USAGE", |w| {
        let to = format!("other={}", w.path(&w.fresh("to")));
        w.f.receiver(&["restore", "web", "--to", &to])
    });
    t.add("target: a loop of links", 1, "E_TARGET", |w| {
        let path = w.f.path(&w.fresh("loop"));
        std::os::unix::fs::symlink(&path, &path).unwrap();
        restore(w, &[path.to_str().unwrap()])
    });
    t.add("target: what this machine replicates", 4, "E_TARGET", |w| {
        let mut command = w.f.receiver_command(&["restore", "web/data", "--to", &w.path("disk.img")]);
        command.env("BACKHAUL_AGENT_STATE", &w.agent.state);
        backhaul_tests::process::run(command, None)
    });
}

fn stores(t: &mut Table) {
    for bad in [
        "",
        "x",
        "/srv/store",
        "file://relative/path",
        "http://host/x",
        "s3://",
        "s3:///prefix",
        "file://",
        "s3://bucket/p?endpoint=ftp://x",
        "s3://bucket/p?colour=blue",
        "s3://UPPER/p",
        "s3://bucket/../p",
    ] {
        t.add(format!("store URL: {bad:?}"), 78, "E_CONFIG", move |w| w.on_store(bad, &["points"]));
    }
    t.add("store: no folder", 78, "E_STORE", |w| w.on_store(&format!("file://{}", w.path("missing")), &["points"]));
    t.add("store: an empty folder", 10, "E_NOTFOUND", |w| {
        w.on_store(&format!("file://{}", w.path("folder")), &["points"])
    });
    t.add("store: an empty folder, to serve", 78, "E_STATE_DIR", |w| {
        w.on_store(&format!("file://{}", w.path("folder")), &["serve", "--listen", "127.0.0.1:0"])
    });
    t.add("store: a file", 78, "E_STORE", |w| w.on_store(&format!("file://{}", w.path("file")), &["points"]));
    t.add("store: a file, to init", 78, "E_STORE", |w| w.on_store(&format!("file://{}", w.path("file")), &["init"]));
    t.add("store: below a file, to init", 78, "E_STORE", |w| {
        w.on_store(&format!("file://{}/x", w.path("file")), &["init"])
    });
}

fn buckets(t: &mut Table) {
    let url = |w: &Shared| w.bucket.url("p");
    t.add("bucket: not initialised", 10, "E_NOTFOUND", move |w| w.on_bucket(&url(w), &[], &["points"]));
    t.add("bucket: no such one", 78, "E_STORE", move |w| {
        w.on_bucket(&url(w).replace(BUCKET, "another-one"), &[], &["points"])
    });
    t.add("bucket: a wrong secret", 12, "E_STORE", move |w| {
        w.on_bucket(&url(w), &[("AWS_SECRET_ACCESS_KEY", "x")], &["init"])
    });
    t.add("bucket: a wrong key", 12, "E_STORE", move |w| {
        w.on_bucket(&url(w), &[("AWS_ACCESS_KEY_ID", "AKIANOBODY")], &["init"])
    });
    t.add("bucket: a key with a line break", 12, "E_STORE", move |w| {
        w.on_bucket(&url(w), &[("AWS_ACCESS_KEY_ID", "AKIA\nX")], &["init"])
    });
    t.add("bucket: an empty secret", 12, "E_STORE", move |w| {
        w.on_bucket(&url(w), &[("AWS_SECRET_ACCESS_KEY", "")], &["points"])
    });
    t.add("bucket: nothing listens", 13, "E_STORE", |w| {
        w.on_bucket("s3://bucket/p?endpoint=http://127.0.0.1:1", &[], &["points"])
    });
    t.add("bucket: https where there is none", 13, "E_STORE", move |w| {
        w.on_bucket(&url(w).replace("http:", "https:"), &[], &["points"])
    });
    t.add("bucket: no S3 server", 13, "E_STORE", |w| w.on_bucket(&w.web.url("p"), &[], &["init"]));
}

/// Objects are read-only.
fn write(path: &Path, bytes: &[u8]) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn one(store: &Path, containing: &str) -> std::path::PathBuf {
    let mut found = Vec::new();
    walk(store, &mut found);
    found.into_iter().find(|p| p.to_str().is_some_and(|p| p.contains(containing))).expect("there is one")
}

fn walk(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => walk(&path, found),
            path => found.push(path),
        }
    }
}

fn damaged_stores(t: &mut Table) {
    let to = |w: &Shared| w.path(&w.fresh("to"));
    for (what, containing) in [("its log record", "/log/00000000000000000001"), ("its segment", "/segments/")] {
        for (how, bytes) in [("empty", &b""[..]), ("noise", &[0x5a; 4000])] {
            t.add(format!("damaged: {what} is {how}, restore"), 6, "E_DAMAGED", move |w| {
                w.store_after(|s| write(&one(s, containing), bytes), &["restore", "web/data@1", "--to", &to(w)])
            });
        }
        t.add(format!("damaged: {what} is gone, restore"), 6, "E_DAMAGED", move |w| {
            w.store_after(
                |s| std::fs::remove_file(one(s, containing)).unwrap(),
                &["restore", "web/data@1", "--to", &to(w)],
            )
        });
    }
    t.add("damaged: a later version of the store", 6, "E_DAMAGED", |w| {
        w.store_after(
            |s| {
                let path = one(s, "/format");
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[10] = 9;
                let sum = blake3::Hasher::new().update(&bytes[..32]).update(&bytes[64..]).finalize();
                bytes[32..64].copy_from_slice(sum.as_bytes());
                write(&path, &bytes);
            },
            &["points"],
        )
    });
}

fn receiver_state(t: &mut Table) {
    const TOKEN: &[&str] = &["token", "--group", "web", "--address", "a:1"];
    t.add("receiver state: none", 78, "E_STATE_DIR", |w| w.on_store(w.f.store_url(), TOKEN));
    t.add("receiver state: none, to serve", 78, "E_STATE_DIR", |w| {
        w.on_store(w.f.store_url(), &["serve", "--listen", "127.0.0.1:0"])
    });
    t.add("receiver state: none, to init again", 4, "E_STATE_DIR", |w| w.on_store(w.f.store_url(), &["init"]));
    for name in ["authority.key", "authority.pem"] {
        t.add(format!("receiver state: {name} is noise"), 78, "E_STATE_DIR", move |w| {
            w.receiver_after(put(name, b"\xff\xfe"), TOKEN)
        });
        t.add(format!("receiver state: {name} is empty"), 78, "E_STATE_DIR", move |w| {
            w.receiver_after(put(name, b""), TOKEN)
        });
        t.add(format!("receiver state: {name} is gone"), 78, "E_STATE_DIR", move |w| {
            w.receiver_after(|state| std::fs::remove_file(state.join(name)).unwrap(), TOKEN)
        });
    }
    t.add("serve: twice", 11, "E_BUSY", |w| w.f.receiver(&["serve", "--listen", "127.0.0.1:0"]));
    t.add("serve: where somebody listens", 13, "E_BIND", |w| {
        w.receiver_after(|_| (), &["serve", "--listen", &w.address])
    });
    t.add("serve: on an address of another machine", 13, "E_BIND", |w| {
        w.receiver_after(|_| (), &["serve", "--listen", "192.0.2.1:4433"])
    });
}

use super::*;

fn sh(command: &str, timeout: Duration) -> Result<String, String> {
    let env = [("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
    let ran = run(Hook::Pre, command, &env, timeout, None, |_| {});
    ran.map(|out| String::from_utf8(out).expect("UTF-8")).map_err(|e| e.to_string())
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn what_it_printed_and_how_it_ended() {
    assert_eq!(sh("echo a=/b; echo c >&2", LONG).as_deref(), Ok("a=/b\n"));
    let error = sh("echo one >&2; printf 'two\\033[31m' >&2; exit 3", LONG).expect_err("it failed");
    assert_eq!(error, "the pre hook ended with exit code 3; it said: one | two [31m");
    let error = sh("kill -9 $$", LONG).expect_err("it failed");
    assert!(error.contains("signal 9"), "{error}");
    let error =
        sh("i=0; while [ $i -lt 5000 ]; do echo line $i >&2; i=$((i+1)); done; exit 1", LONG).expect_err("failed");
    assert!(error.ends_with("line 4998 | line 4999") && !error.contains("line 4990"), "the end of it: {error}");
}

#[test]
fn its_environment_is_what_it_was_given() {
    let names = sh("env | grep -v '^_=' | cut -d= -f1 | sort | tr '\\n' ' '; read x || echo no input; pwd", LONG);
    assert_eq!(names.as_deref(), Ok("PATH PWD no input\n/\n"));
}

#[test]
fn whatever_it_does_it_ends() {
    let begun = Instant::now();
    let error = sh("yes", LONG).expect_err("too much");
    assert!(error.contains("printed more than"), "{error}");
    // What it leaves running keeps nobody waiting, though it holds the pipes.
    assert_eq!(sh("sleep 50 & echo fine", LONG).as_deref(), Ok("fine\n"));
    let error = sh("sleep 50", Duration::from_secs(1)).expect_err("too long");
    assert!(error.contains("longer than 1 s"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "SIGTERM is enough for these: {:?}", begun.elapsed());
    let mut group = None;
    let ignoring = "trap '' TERM; (while :; do sleep 1; done) & while :; do sleep 1; done";
    let ran = run(Hook::Post, ignoring, &[], Duration::from_secs(1), None, |pid| group = Some(pid));
    assert!(ran.is_err());
    let all = begun.elapsed();
    assert!(all > GRACE && all < GRACE + Duration::from_secs(8), "SIGKILL after {GRACE:?}: {all:?}");
    let group = group.expect("it was started");
    let gone = || test_kill_process_group(group).is_err();
    // The kernel may need a moment.
    let deadline = Instant::now() + Duration::from_secs(5);
    while !gone() {
        assert!(Instant::now() < deadline, "no process of it is left");
        std::thread::sleep(TICK);
    }
}

#[test]
fn it_is_stopped_when_the_round_is() {
    let stop = AtomicBool::new(false);
    let begun = Instant::now();
    let ran = std::thread::scope(|s| {
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(200));
            stop.store(true, Ordering::Release);
        });
        run(Hook::Pre, "sleep 50", &[], LONG, Some(&stop), |_| {})
    });
    assert!(ran.is_err_and(|e| e.to_string().contains("was stopped")) && begun.elapsed() < Duration::from_secs(4));
}

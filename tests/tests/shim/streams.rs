//! Standard streams in all their kinds: FIFOs with and without a reader, files, loggers, terminals;
//! closed early, left open, larger than any buffer.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

use super::calls::{Fifo, Streams, Task};
use super::*;

/// A logger as `binary://` URIs name it: notes whose it is, and what came on each descriptor.
const LOGGER: &str = "#!/bin/sh
exec 5>&-
echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $1=$2\" > \"$2\"
cat <&3 >> \"$2\" &
cat <&4 >> \"$2\" &
wait
";

impl Streams {
    /// Both outputs to one place: containerd's shim takes both or none.
    fn to(output: &str) -> Self {
        let output = output.to_owned();
        Self { stdout: output.clone(), stderr: output, ..Default::default() }
    }

    fn on_terminal(stdout: &str) -> Self {
        Self { stdout: stdout.to_owned(), terminal: true, ..Default::default() }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(node().path(path)).unwrap_or_default()
}

fn install_logger() -> Result<&'static str> {
    node().command(&["sh", "-c", "cat > /run/logger; chmod 755 /run/logger"]).stdin(LOGGER).ok()?;
    Ok("/run/logger")
}

/// Method: a process that reads to the end ends when its input is closed, and not before.
fn input_ends_when_it_is_closed(runtime: &Runtime) -> Result<()> {
    let task = Task::running(runtime, "input", "sleep 600")?;
    let (stdin, mut stdout) = (Fifo::without_reader("in")?, Fifo::new("out")?);
    let streams = Streams { stdin: stdin.path.clone(), ..Streams::to(&stdout.path) };
    task.exec("e", &streams, "cat; echo end")?;
    task.start("e")?;
    let mut writer = std::fs::File::options().write(true).open(node().path(&stdin.path))?;
    writer.write_all(b"one\n")?;
    wait_until("the input comes through", SOON, || Ok(stdout.text()?.contains("one\n")))?;
    drop(writer);
    // Another client may come: the end of one is not the end of the input.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(stdout.text()?, "");
    let mut writer = std::fs::File::options().write(true).open(node().path(&stdin.path))?;
    writer.write_all(b"two\n")?;
    drop(writer);
    task.close_stdin("e")?;
    assert_eq!(task.wait("e")?, 0);
    // What was written may come after the end.
    let mut seen = String::new();
    wait_until("the rest comes through", SOON, || {
        seen += &stdout.text()?;
        Ok(seen == "two\nend\n")
    })
    .with_context(|| seen.clone())?;
    Ok(())
}

/// Method: the process lets go of its input while the client goes on writing.
fn input_may_be_more_than_the_process_reads(runtime: &Runtime) -> Result<()> {
    let task = Task::running(runtime, "unread", "sleep 600")?;
    let (stdin, stdout) = (Fifo::without_reader("in")?, Fifo::new("out")?);
    let streams = Streams { stdin: stdin.path.clone(), ..Streams::to(&stdout.path) };
    task.exec("e", &streams, "head -c 3 > /three; exec 0<&-; sleep 1; exit 3")?;
    task.start("e")?;
    let mut options = std::fs::File::options();
    let writer = options.write(true).custom_flags(libc::O_NONBLOCK).open(node().path(&stdin.path));
    // Whether the rest still fits, or no client takes it any more, is not the point.
    let _ = writer?.write(&vec![b'x'; 1 << 16]);
    assert_eq!(task.wait("e")?, 3);
    assert_eq!(task.container.exec_ok("look", "cat /three")?, "xxx");
    Ok(())
}

/// Method: more than FIFO and pipe hold, so the process blocks; it can be killed, and deleted soon.
fn output_that_nobody_reads_blocks_nobody_else(runtime: &Runtime) -> Result<()> {
    // Open at the other end, as containerd's shim wants it, and never read.
    let stdout = Fifo::new("unread")?;
    let task = Task::of(runtime, "noreader", &[], "seq 1 1000000; exit 1")?;
    task.create(&Streams::to(&stdout.path), None)?;
    task.start("")?;
    assert_eq!(task.container.exec("e", "exit 7")?.code, 7);
    assert_eq!(task.container.status()?, "RUNNING");
    task.kill("", 9)?;
    assert_eq!(task.wait("")?, 137);
    let begun = Instant::now();
    assert_eq!(task.delete()?, 137);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    Ok(())
}

/// Method: the reader goes away in the middle, as in a restart of containerd, and another comes.
fn output_waits_for_the_next_reader(runtime: &Runtime) -> Result<()> {
    let mut first = Fifo::new("readers")?;
    let task = Task::of(runtime, "readers", &[], "echo one; sleep 1; echo two; sleep 600")?;
    task.create(&Streams::to(&first.path), None)?;
    task.start("")?;
    wait_until("the first line comes", SOON, || Ok(first.text()?.contains("one")))?;
    let path = first.path.clone();
    drop(first);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(node().ok(&["timeout", "5", "head", "-n", "1", &path])?, "two\n");
    assert_eq!(task.container.status()?, "RUNNING");
    Ok(())
}

fn an_exec_gives_all_of_a_long_output(runtime: &Runtime) -> Result<()> {
    let container = Container::start(runtime, "longexec", &[], "sleep 600")?;
    let output = container.exec_ok("e", "seq 1 200000; seq 1 200000 >&2")?;
    let expected: String = (1..=200_000).map(|line| format!("{line}\n")).collect();
    assert!(output == expected, "{} bytes", output.len());
    Ok(())
}

/// Method: more than a FIFO holds, and the client reads only once the process has ended.
fn a_terminals_output_is_whole(runtime: &Runtime) -> Result<()> {
    const BYTES: usize = (64 << 10) + 6000;
    let task = Task::running(runtime, "ttyend", "sleep 600")?;
    for round in 0..3 {
        let (exec, mut stdout) = (format!("e{round}"), Fifo::new("tty-end")?);
        let script = format!("stty raw; head -c {BYTES} /dev/zero");
        task.exec(&exec, &Streams::on_terminal(&stdout.path), &script)?;
        task.start(&exec)?;
        assert_eq!(task.wait(&exec)?, 0);
        let mut seen = 0;
        wait_until("all of the output comes", SOON, || {
            seen += stdout.text()?.len();
            Ok(seen == BYTES)
        })
        .with_context(|| format!("{seen} of {BYTES} bytes"))?;
        task.delete_exec(&exec)?;
    }
    Ok(())
}

/// Method: both outputs to one file in a directory that is not there yet, appended on the second
/// run.
fn output_goes_to_a_file(runtime: &Runtime) -> Result<()> {
    let path = format!("/run/logs-{}/deep/out.log", runtime.tag);
    let uri = format!("file://{path}");
    let task = Task::of(runtime, "file", &[], "echo out; sleep 0.2; echo err >&2")?;
    for _ in 0..2 {
        task.create(&Streams::to(&uri), None)?;
        task.start("")?;
        task.wait("")?;
        task.delete()?;
    }
    assert_eq!(read(&path), "out\nerr\nout\nerr\n");
    Ok(())
}

fn output_goes_to_a_logger(runtime: &Runtime) -> Result<()> {
    let path = format!("/run/logger-{}", runtime.tag);
    let uri = format!("binary://{}?file={path}", install_logger()?);
    let task = Task::of(runtime, "logger", &[], "echo out; sleep 0.3; echo err >&2")?;
    let head = format!("default/{} file={path}\n", task.container.id);
    task.create(&Streams::to(&uri), None)?;
    task.start("")?;
    task.wait("")?;
    wait_until("all is logged", SOON, || Ok(read(&path) == format!("{head}out\nerr\n")))?;
    task.delete()?;
    // With a terminal there is one stream.
    let task = Task::of(runtime, "logger-tty", &["-t"], "test -t 1 && echo term; sleep 600")?;
    let head = format!("default/{} file={path}\n", task.container.id);
    task.create(&Streams::on_terminal(&uri), None)?;
    task.start("")?;
    wait_until("all is logged", SOON, || Ok(read(&path) == format!("{head}term\r\n")))
}

/// Method: the logger of the whole container dies; what it does not take must not hold anybody.
fn a_logger_that_dies_holds_nobody(runtime: &Runtime) -> Result<()> {
    let script = "#!/bin/sh\nexec 5>&-\nhead -n 1 <&3 > /run/one-line\n";
    node().command(&["sh", "-c", "cat > /run/dies; chmod 755 /run/dies"]).stdin(script).ok()?;
    let task = Task::of(runtime, "dies", &[], "trap '' PIPE; seq 1 1000000; exit 4")?;
    task.create(&Streams::to("binary:///run/dies"), None)?;
    task.start("")?;
    // The writer meets a closed pipe, which its shell reports by whatever code it likes.
    task.wait("")?;
    task.delete()?;
    assert_eq!(read("/run/one-line"), "1\n");
    Ok(())
}

fn a_size_before_the_start_holds(runtime: &Runtime) -> Result<()> {
    let mut stdout = Fifo::new("tty")?;
    let task = Task::of(runtime, "early-size", &["-t"], "stty size; sleep 600")?;
    task.create(&Streams::on_terminal(&stdout.path), None)?;
    task.resize("", 123, 45)?;
    task.start("")?;
    let mut text = String::new();
    wait_until("its size is reported", SOON, || {
        text.push_str(&stdout.text()?);
        Ok(text.ends_with('\n'))
    })?;
    assert_eq!(text, "45 123\r\n");
    // An exec has no terminal before it runs: nothing happens, and nothing fails.
    let mut stdout = Fifo::new("tty-exec")?;
    task.exec("e", &Streams::on_terminal(&stdout.path), "tty > /dev/null && echo yes; sleep 600")?;
    task.resize("e", 80, 25)?;
    task.start("e")?;
    wait_until("it has a terminal", SOON, || Ok(stdout.text()?.contains("yes")))?;
    task.resize("e", 90, 30)?;
    // Without a terminal there is nothing to resize, and nothing to fail for.
    task.exec("plain", &Streams::default(), "sleep 600")?;
    task.start("plain")?;
    task.resize("plain", 80, 25)
}

/// Not containerd's shim, which forgets it and keeps the input open (docs/shim.md).
#[test]
fn an_input_closed_before_the_start_is_at_its_end() -> Result<()> {
    let task = Task::running(&GODWIT, "early-close", "sleep 600")?;
    let stdin = Fifo::without_reader("in")?;
    let streams = Streams { stdin: stdin.path.clone(), ..Default::default() };
    task.exec("e", &streams, "cat; exit 5")?;
    task.close_stdin("e")?;
    task.start("e")?;
    assert_eq!(task.wait("e")?, 5);
    Ok(())
}

/// Not containerd's shim, whose Create waits for a reader, and for both outputs (docs/shim.md).
#[test]
fn a_fifo_without_a_reader_holds_no_create() -> Result<()> {
    let stdout = Fifo::without_reader("late-reader")?;
    let task = Task::of(&GODWIT, "late-reader", &[], "echo out; sleep 600")?;
    let streams = Streams { stdout: stdout.path.clone(), ..Default::default() };
    task.create(&streams, None)?;
    task.start("")?;
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(node().ok(&["timeout", "5", "head", "-n", "1", &stdout.path])?, "out\n");
    Ok(())
}

/// Not containerd's shim, which answers Delete at once: its client then closes a FIFO that it has
/// not read, and `ctr tasks exec` prints nothing, with exit code 0, in one of some 150 calls on a
/// busy machine (docs/shim.md).
///
/// Method: the client reads late, and closes its end as soon as Delete has returned.
#[test]
fn an_exec_is_deleted_once_its_output_is_read() -> Result<()> {
    let task = Task::running(&GODWIT, "lateread", "sleep 600")?;
    let mut stdout = Fifo::new("late-read")?;
    task.exec("e", &Streams::to(&stdout.path), "echo whole")?;
    task.start("e")?;
    assert_eq!(task.wait("e")?, 0);
    let (seen, deleted) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            stdout.text()
        });
        let begun = Instant::now();
        let deleted = task.delete_exec("e").map(|code| (code, begun.elapsed()));
        (reader.join(), deleted)
    });
    let text = seen.map_err(|_panic| anyhow::anyhow!("the reader failed"))?;
    assert_eq!(text?, "whole\n");
    let (code, took) = deleted?;
    assert_eq!(code, 0);
    assert!(
        took >= Duration::from_millis(400),
        "deleted after {took:?}, before its output was read"
    );
    // A client that never reads holds nothing back for long.
    let unread = Fifo::new("never-read")?;
    task.exec("n", &Streams::to(&unread.path), "echo lost")?;
    task.start("n")?;
    assert_eq!(task.wait("n")?, 0);
    let begun = Instant::now();
    task.delete_exec("n")?;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    Ok(())
}

with_both_runtimes! {
    input_ends_when_it_is_closed,
    input_may_be_more_than_the_process_reads,
    output_that_nobody_reads_blocks_nobody_else,
    output_waits_for_the_next_reader,
    an_exec_gives_all_of_a_long_output,
    a_terminals_output_is_whole,
    output_goes_to_a_file,
    output_goes_to_a_logger,
    a_logger_that_dies_holds_nobody,
    a_size_before_the_start_holds,
}

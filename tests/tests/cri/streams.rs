//! Exec, attach and port forwarding as a kubelet serves them: the CRI names an address on the
//! node's loopback, where containerd's streaming server speaks WebSocket. The first byte of each
//! message is its channel.

use std::net::TcpStream;
use std::time::Instant;

use serde_json::Value;
use tungstenite::client::IntoClientRequest as _;
use tungstenite::{Error, Message, WebSocket};

use super::*;

/// Version 4 ends with a status on a channel of its own. Port forwarding has the same.
const PROTOCOL: &str = "v4.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// How long a read waits before the deadline is looked at again.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// A connection to the streaming server, and what has come on each channel.
struct Session {
    socket: WebSocket<TcpStream>,
    came: BTreeMap<u8, Vec<u8>>,
    is_over: bool,
}

impl Session {
    fn open(url: &str) -> Result<Self> {
        let rest =
            url.strip_prefix("http://").with_context(|| format!("no such address: {url}"))?;
        let (address, _) = rest.split_once('/').context("an address without a path")?;
        let stream = node().in_network(|| Ok(TcpStream::connect(address)?))?;
        stream.set_read_timeout(Some(SOON))?;
        let mut request = format!("ws://{rest}").into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", PROTOCOL.parse()?);
        let (socket, _) = tungstenite::client(request, stream)?;
        socket.get_ref().set_read_timeout(Some(READ_PAUSE))?;
        Ok(Self { socket, came: BTreeMap::new(), is_over: false })
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        Ok(self.socket.send(Message::binary([&[channel], bytes].concat()))?)
    }

    fn resize(&mut self, width: u16, height: u16) -> Result<()> {
        self.send(RESIZE, format!("{{\"Width\": {width}, \"Height\": {height}}}").as_bytes())
    }

    fn text(&self, channel: u8) -> String {
        let bytes = self.came.get(&channel).map(Vec::as_slice).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// All that came, for people.
    fn shown(&self) -> Vec<String> {
        self.came.keys().map(|channel| format!("{channel}: {:?}", self.text(*channel))).collect()
    }

    fn read_until(&mut self, what: &str, is_enough: impl Fn(&Self) -> bool) -> Result<()> {
        let begun = Instant::now();
        while !is_enough(self) {
            ensure!(!self.is_over, "the stream is over before {what}: {:?}", self.shown());
            ensure!(begun.elapsed() < SOON, "{what}: not in time: {:?}", self.shown());
            match self.socket.read() {
                Ok(Message::Binary(bytes)) => {
                    let (channel, bytes) = bytes.split_first().context("an empty message")?;
                    self.came.entry(*channel).or_default().extend(bytes);
                }
                Ok(_) => {}
                Err(Error::ConnectionClosed | Error::AlreadyClosed) => self.is_over = true,
                Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn read_until_text(&mut self, channel: u8, text: &str) -> Result<()> {
        self.read_until(text, |session| session.text(channel).contains(text))
    }

    /// Reads to the end. Returns the exit code, or else why there is none.
    fn end(&mut self) -> Result<Result<i32, String>> {
        self.read_until("the end", |session| session.is_over)?;
        let status: Value = serde_json::from_str(&self.text(STATUS))?;
        if status["status"] == "Success" {
            return Ok(Ok(0));
        }
        let message = status["message"].as_str().unwrap_or_default().to_owned();
        let code =
            status.pointer("/details/causes/0").filter(|cause| cause["reason"] == "ExitCode");
        let code = code.and_then(|cause| cause["message"].as_str()?.parse().ok());
        Ok(code.ok_or(message))
    }
}

impl Member<'_> {
    fn exec_streams(&self, words: &[&str], tty: bool) -> Result<Session> {
        let request = ExecRequest {
            container_id: self.id.clone(),
            cmd: words.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            // A terminal has one output.
            stderr: !tty,
        };
        Session::open(&cri(async |cri| cri.exec(request).await)?.url)
    }

    fn attach(&self, tty: bool) -> Result<Session> {
        let request = AttachRequest {
            container_id: self.id.clone(),
            stdin: true,
            tty,
            stdout: true,
            stderr: !tty,
        };
        Session::open(&cri(async |cri| cri.attach(request).await)?.url)
    }
}

fn exec_streams_carry_everything(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "streams", NamespaceMode::Container)?;
    let member = pod.start("main", "sleep 600")?;
    let script = "read line; echo out $line; echo err $line >&2; exit 5";
    let mut exec = member.exec_streams(&["sh", "-c", script], false)?;
    exec.send(STDIN, b"hello\n")?;
    assert_eq!(exec.end()?, Ok(5));
    assert_eq!(
        (exec.text(STDOUT), exec.text(STDERR)),
        ("out hello\n".into(), "err hello\n".into())
    );

    let mut exec = member.exec_streams(&["true"], false)?;
    assert_eq!(exec.end()?, Ok(0));
    let mut exec = member.exec_streams(&["sh", "-c", "kill -9 $$"], false)?;
    assert_eq!(exec.end()?, Ok(137));
    // More than any pipe or FIFO on the way holds, both ways.
    let mut exec = member.exec_streams(&["head", "-c", "1048576"], false)?;
    for _ in 0..32 {
        exec.send(STDIN, &[b'x'; 1 << 15])?;
        exec.read_until("what was sent before", |_| true)?;
    }
    assert_eq!(exec.end()?, Ok(0));
    assert_eq!(exec.came[&STDOUT], vec![b'x'; 1 << 20]);

    let mut exec = member.exec_streams(&["/no/such/program"], false)?;
    let why = exec.end()?.expect_err("no such program");
    // runc reports, now and then, that its child went away before it could say why.
    assert!(why.contains("/no/such/program") || why.contains("connection reset"), "{why}");
    Ok(())
}

/// Method: a client that is cut off; what it had started reads the end of its input.
fn an_exec_sees_its_client_leave(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "leave", NamespaceMode::Container)?;
    let member = pod.start("main", "sleep 600")?;
    let mut exec =
        member.exec_streams(&["sh", "-c", "cat; echo gone > /left; sleep 606"], false)?;
    exec.send(STDIN, b"here\n")?;
    exec.read_until_text(STDOUT, "here\n")?;
    drop(exec);
    if shims_hear_of_leaving_clients() {
        wait_until("it has seen the end", SOON, || Ok(member.exec("cat /left").is_ok()))?;
    }
    Ok(())
}

/// containerd 2.1 gives up its call about it the moment that the client is gone ("failed to close
/// stdin [...] context canceled" in its log).
fn shims_hear_of_leaving_clients() -> bool {
    Containerd::of_suite() == Containerd::V1
}

fn exec_on_a_terminal_is_one(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "tty", NamespaceMode::Container)?;
    let member = pod.start("main", "sleep 600")?;
    let script = "trap 'echo interrupted >&2; exit 4' INT; tty; \
                  until [ \"$(stty size)\" = '33 111' ]; do sleep 0.05; done; echo resized; \
                  while :; do sleep 0.05; done";
    let mut exec = member.exec_streams(&["sh", "-c", script], true)?;
    exec.read_until_text(STDOUT, "/dev/pts/")?;
    exec.resize(111, 33)?;
    exec.read_until_text(STDOUT, "resized\r\n")?;
    // What a terminal makes of Ctrl-C.
    exec.send(STDIN, b"\x03")?;
    assert_eq!(exec.end()?, Ok(4));
    assert!(exec.text(STDOUT).contains("interrupted\r\n"), "{:?}", exec.shown());
    Ok(())
}

/// Method: clients come, watch side by side, leave, and come back after containerd was restarted.
fn clients_attach_and_leave(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "attach", NamespaceMode::Container)?;
    let script = "while read line; do echo got $line; echo also $line >&2; done; echo end; exit 3";
    let member = pod.create_as("main", script, |config| config.stdin = true)?;
    member.start()?;
    let mut first = member.attach(false)?;
    let mut second = member.attach(false)?;
    // Output goes to those who are there by then: containerd says that it attached before it has.
    std::thread::sleep(Duration::from_millis(300));
    first.send(STDIN, b"one\n")?;
    for client in [&mut first, &mut second] {
        client.read_until_text(STDOUT, "got one\n")?;
        client.read_until_text(STDERR, "also one\n")?;
    }
    drop((first, second));
    node().kill_containerd()?;
    node().start_containerd()?;
    wait_until("the CRI answers", SOON, || Ok(member.status().is_ok()))?;
    let mut third = member.attach(false)?;
    std::thread::sleep(Duration::from_millis(300));
    third.send(STDIN, b"two\n")?;
    third.read_until_text(STDOUT, "got two\n")?;
    assert_eq!(third.text(STDOUT), "got two\n");
    drop(third);
    assert_eq!(member.status()?.state(), ContainerState::ContainerRunning);
    let logged = Member::lines(&member.log)?;
    let out = logged.iter().filter(|(stream, _)| stream == "stdout").map(|(_, text)| text);
    assert_eq!(out.collect::<Vec<_>>(), ["got one", "got two"]);
    Ok(())
}

/// Method: the input of such a container ends with its first client.
fn an_input_for_one_client_ends_with_it(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "once", NamespaceMode::Container)?;
    let script = "while read line; do echo got $line; done; exit 3";
    let once = |config: &mut ContainerConfig| (config.stdin, config.stdin_once) = (true, true);
    let member = pod.create_as("main", script, once)?;
    member.start()?;
    let mut client = member.attach(false)?;
    std::thread::sleep(Duration::from_millis(300));
    client.send(STDIN, b"one\n")?;
    client.read_until_text(STDOUT, "got one\n")?;
    drop(client);
    if shims_hear_of_leaving_clients() {
        assert_eq!(member.wait_for_end()?.exit_code, 3);
    }
    Ok(())
}

fn clients_attach_to_a_terminal(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "console", NamespaceMode::Container)?;
    let script = "until [ \"$(stty size)\" = '44 99' ]; do sleep 0.05; done; echo resized; \
                  read line; echo got $line >&2; exit 6";
    let terminal = |config: &mut ContainerConfig| (config.stdin, config.tty) = (true, true);
    let member = pod.create_as("main", script, terminal)?;
    member.start()?;
    let mut client = member.attach(true)?;
    std::thread::sleep(Duration::from_millis(300));
    client.resize(99, 44)?;
    client.read_until_text(STDOUT, "resized\r\n")?;
    client.send(STDIN, b"hello\r")?;
    client.read_until("the end", |session| session.is_over)?;
    assert!(client.text(STDOUT).ends_with("hello\r\ngot hello\r\n"), "{:?}", client.shown());
    assert_eq!(member.wait_for_end()?.exit_code, 6);
    Ok(())
}

/// Method: two ports on one connection, one of a server on the pod's loopback, one without a
/// server.
fn ports_are_forwarded_into_the_pod(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "ports", NamespaceMode::Container)?;
    let script =
        "mkdir /www; echo the page > /www/page; httpd -p 127.0.0.1:8080 -h /www; sleep 600";
    let member = pod.start("main", script)?;
    wait_until("the server listens", SOON, || {
        Ok(member.exec("netstat -ltn")?.contains("127.0.0.1:8080"))
    })?;
    let ports = [8080_u16, 8081];
    let request = PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: ports.iter().map(|port| i32::from(*port)).collect(),
    };
    let url = cri(async |cri| cri.port_forward(request).await)?.url;
    let list = ports.map(|port| port.to_string()).join(",");
    let mut session = Session::open(&format!("{url}?port={list}"))?;
    // Of each port a channel for data and one for errors; each begins with the port.
    session.send(0, b"GET /page HTTP/1.0\r\n\r\n")?;
    session.read_until("the page and the error", |session| {
        session.text(0).contains("the page\n") && session.text(3).contains("8081")
    })?;
    for channel in 0..4_u8 {
        let port = ports[usize::from(channel / 2)].to_le_bytes();
        assert!(session.came[&channel].starts_with(&port), "{channel}: {:?}", session.shown());
    }
    assert!(session.text(0).contains(" 200 OK\r\n"), "{:?}", session.shown());
    assert!(session.text(3).contains("failed to connect"), "{:?}", session.shown());
    assert_eq!((session.came[&1].len(), session.came[&2].len()), (2, 2));
    Ok(())
}

with_both_handlers! {
    exec_streams_carry_everything,
    an_exec_sees_its_client_leave,
    exec_on_a_terminal_is_one,
    clients_attach_and_leave,
    an_input_for_one_client_ends_with_it,
    clients_attach_to_a_terminal,
    ports_are_forwarded_into_the_pod,
}

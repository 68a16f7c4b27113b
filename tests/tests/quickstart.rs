//! The documents of the way in, run as they are written: exactly the shell commands of
//! `docs/quickstart.md`, and the examples.
//!
//! The two nodes are plain Debian: what makes them Godwit nodes is what the document says. Three
//! things stand for the world outside: `systemctl` (`node/systemctl.sh`), which starts services as
//! the unit files say; a registry under Docker Hub's name; and `ssh`, which enters the node.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit_tests::command::{Invocation, wait_until};
use godwit_tests::document::{self, Step};
use godwit_tests::images::Image;
use godwit_tests::registry::Registry;
use godwit_tests::{Bed, BedOptions, Node, place};

const SYSTEMCTL: &str = include_str!("../node/systemctl.sh");
/// The documents give the nodes addresses from 192.0.2.11 on.
const FIRST_ADDRESS: u8 = 11;
const SOON: Duration = Duration::from_secs(20);
const STEP_TIMEOUT: Duration = Duration::from_secs(300);

#[test]
fn the_commands_of_the_quickstart_move_a_container_between_two_plain_nodes() -> Result<()> {
    let steps = document::steps(&read("docs/quickstart.md")?)?;
    ensure!(steps.len() > 5, "{} steps", steps.len());
    let bed = start(BedOptions::nodes(2).plain_debian())?;
    let [nodes @ .., hub] = bed.nodes() else { bail!("no nodes") };
    let registry = Registry::start_as_docker_hub(hub, nodes)?;
    registry.push_as(Image::Redis, "docker.io/library/redis:7")?;
    for node in nodes {
        ensure!(!node.run(&["sh", "-c", "command -v godwit"])?.succeeded(), "godwit is there");
        install_script(SYSTEMCTL, &node.path("/usr/local/bin/systemctl"))?;
        // The nodes have all packages and reach no mirror: apt is to find that, and nothing to do.
        node.sh("rm /etc/apt/apt.conf.d/90test-node /etc/apt/sources.list.d/*")?;
    }
    let checkout = Checkout::new(&bed)?;
    for step in &steps {
        for place in &step.places {
            run(step, place, &checkout, nodes)
                .with_context(|| format!("docs/quickstart.md, line {}, on {place}", step.line))?;
        }
    }
    Ok(())
}

/// The short form in the README is the quickstart with commands left out, and so is as right.
#[test]
fn the_commands_of_the_readme_are_those_of_the_quickstart() -> Result<()> {
    let whole = document::steps(&read("docs/quickstart.md")?)?;
    let mut rest = whole.iter();
    for step in document::steps(&read("README.md")?)? {
        let found = rest.any(|one| one.script == step.script);
        ensure!(found, "README.md, line {}: not in docs/quickstart.md, in this order", step.line);
    }
    Ok(())
}

/// Method: the container moves from the first node to the second while it counts; what it wrote is
/// then whole and goes on.
#[test]
fn the_examples_make_a_site_of_three_nodes_and_a_container_that_moves() -> Result<()> {
    let bed = start(BedOptions::nodes(3).bare())?;
    let [nodes @ .., hub] = bed.nodes() else { bail!("no nodes") };
    let registry = Registry::start_as_docker_hub(hub, nodes)?;
    registry.push_as(Image::Busybox, "docker.io/library/busybox:1")?;
    for node in nodes {
        fs::write(node.path("/etc/godwit/godwit.toml"), read("examples/site/godwit.toml")?)?;
        node.start_daemon()?;
        node.start_containerd()?;
    }
    let [a, b, _] = nodes else { bail!("not three nodes") };
    let peers = a.ok(&["godwit", "--output", "json", "peers"])?;
    ensure!(peers.matches("\"reachable\":true").count() == 2, "{peers}");

    a.command(&["sh"]).stdin(read("examples/ctr/ledger.sh")?).ok()?;
    let lines = |node: &Node| {
        let words = ["tasks", "exec", "--exec-id", "look", "ledger", "cat", "/ledger/lines"];
        node.ok(&[&["ctr"], &words[..]].concat())
    };
    wait_until("it counts", SOON, || Ok(lines(a)?.lines().count() > 1))?;
    a.ok(&["godwit", "migrate", "ledger", "--from", "edge-a", "--to", "edge-b"])?;
    let moved = lines(b)?.lines().count();
    wait_until("it goes on", SOON, || Ok(lines(b)?.lines().count() > moved))?;
    for (number, line) in (1..).zip(lines(b)?.lines()) {
        ensure!(line == format!("{number} counted by the ledger"), "line {number}: {line}");
    }
    Ok(())
}

/// Starts nodes at the documents' addresses, and one more, `hub`, with containerd alone.
fn start(mut options: BedOptions) -> Result<Bed> {
    let count = options.nodes.len();
    options.nodes.push("hub".to_owned());
    let bed = Bed::start(&options)?;
    for (node, last) in bed.nodes()[..count].iter().zip(FIRST_ADDRESS..) {
        node.ok(&["ip", "addr", "add", &format!("192.0.2.{last}/24"), "dev", "br0"])?;
    }
    bed.node(count).start_containerd()?;
    Ok(bed)
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(place::workspace().join(path)).with_context(|| path.to_owned())
}

fn run(step: &Step, place: &str, checkout: &Checkout, nodes: &[Node]) -> Result<()> {
    let words = ["sh", "-e", "-c", &step.script];
    let command = match nodes.iter().find(|node| node.name() == place) {
        Some(node) => node.command(&words),
        None if place == "the build machine" => checkout.command(&words),
        None => bail!("no such place"),
    };
    let output = command.timeout(STEP_TIMEOUT).ok()?;
    document::has_lines(&output, &step.prints)
}

/// The checkout of this build, where `ssh` leads to the nodes of a bed.
struct Checkout {
    programs: tempfile::TempDir,
}

impl Checkout {
    fn new(bed: &Bed) -> Result<Self> {
        let programs = tempfile::tempdir()?;
        let testbed = place::binary("testbed");
        let ssh = format!(
            "#!/bin/sh\nnode=${{1#root@}}; shift\nexec {} enter --run {} \"$node\" sh -c \"$*\"\n",
            testbed.display(),
            bed.number(),
        );
        install_script(&ssh, &programs.path().join("ssh"))?;
        Ok(Self { programs })
    }

    /// A command in the checkout, in the environment of a user and not that of a test.
    fn command(&self, words: &[&str]) -> Invocation {
        let mut environment = vec![("PATH".to_owned(), self.programs.path().display().to_string())];
        for name in ["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME", "CARGO_TARGET_DIR"] {
            match std::env::var(name) {
                Ok(value) if name == "PATH" => environment[0].1.push_str(&format!(":{value}")),
                Ok(value) => environment.push((name.to_owned(), value)),
                Err(_) => {}
            }
        }
        let pairs: Vec<_> = environment.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let here = place::workspace().display().to_string();
        let enter = ["env", "--chdir", &here];
        Invocation::new(&[&enter, words].concat()).environment(&pairs)
    }
}

fn install_script(text: &str, path: &Path) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

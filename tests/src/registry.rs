//! An image registry in a node: Debian's `docker-registry`, and what it was asked for.
//!
//! It speaks TLS with a certificate of its own, since containerd 1.7 can be told of no other
//! registry when it pulls by itself; nodes trust it by name.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::Node;
use crate::command::{Background, host, wait_until};
use crate::images::{self, Image};

/// Where it listens.
const PORT: u16 = 5000;
/// Where containerd looks for images of `docker.io`.
const DOCKER_HUB: &str = "registry-1.docker.io";
const DOCKER_HUB_PORT: u16 = 443;
/// Where nodes look for authorities that they trust.
const CERTIFICATE: &str = "/etc/ssl/certs/registry.crt";
const KEY: &str = "/etc/registry.key";
const CONFIGURATION: &str = "/etc/registry.yml";
const LOG: &str = "registry";
const START_TIMEOUT: Duration = Duration::from_secs(10);
const PUSH_TIMEOUT: Duration = Duration::from_secs(120);
const PULL_TIMEOUT: Duration = Duration::from_secs(60);

/// A running registry. Dropping it kills it.
pub struct Registry<'a> {
    node: &'a Node,
    port: u16,
    server: Background,
}

impl<'a> Registry<'a> {
    /// Starts a registry in a node and waits until it answers. It and the nodes of `clients` trust
    /// its certificate.
    pub fn start(node: &'a Node, clients: &[Node]) -> Result<Self> {
        Self::start_at(node, clients, &format!("IP:{}", node.address()), PORT)
    }

    /// Starts one in place of Docker Hub: the nodes of `clients` reach it by Docker Hub's name and
    /// trust it.
    pub fn start_as_docker_hub(node: &'a Node, clients: &[Node]) -> Result<Self> {
        for one in clients.iter().chain([node]) {
            one.sh(&format!("echo '{} {DOCKER_HUB}' >> /etc/hosts", node.address()))?;
        }
        Self::start_at(node, clients, &format!("DNS:{DOCKER_HUB}"), DOCKER_HUB_PORT)
    }

    fn start_at(node: &'a Node, clients: &[Node], subject: &str, port: u16) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let [certificate, key] = ["crt", "key"].map(|name| scratch.path().join(name));
        let name = format!("subjectAltName={subject}");
        let mut command =
            vec!["openssl", "req", "-x509", "-nodes", "-days", "3650", "-newkey", "ec"];
        command.extend(["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=registry"]);
        command.extend(["-addext", &name, "-keyout", key.to_str().context("a path")?]);
        command.extend(["-out", certificate.to_str().context("a path")?]);
        host(&command)?;
        for one in clients.iter().chain([node]) {
            one.ok(&["mkdir", "-p", "/etc/ssl/certs"])?;
            fs::copy(&certificate, one.path(CERTIFICATE))?;
        }
        fs::copy(&key, node.path(KEY))?;
        let server = serve(node, port)?;
        Ok(Self { node, port, server })
    }

    /// Its address, as image references name it.
    pub fn address(&self) -> String {
        format!("{}:{}", self.node.address(), self.port)
    }

    /// Puts an image into it, and returns the reference by which it is pulled. The node keeps
    /// nothing of it.
    pub fn push(&self, image: Image) -> Result<String> {
        let (_, name) = image.reference().rsplit_once('/').context("a name")?;
        let reference = format!("{}/{name}", self.address());
        self.push_as(image, &reference)?;
        Ok(reference)
    }

    /// Puts an image into it under a name of its own.
    pub fn push_as(&self, image: Image, reference: &str) -> Result<()> {
        let (node, own) = (self.node, image.reference());
        images::import(node, image, "overlayfs")?;
        node.ok(&["ctr", "images", "tag", own, reference])?;
        node.command(&["ctr", "images", "push", "--local", reference])
            .timeout(PUSH_TIMEOUT)
            .ok()?;
        node.ok(&["ctr", "images", "rm", "--sync", own, reference])?;
        Ok(())
    }

    /// Digests of the blobs that it was asked for since it was started, one for each time.
    pub fn asked_for(&self) -> Vec<String> {
        let log = self.node.log(LOG);
        let requests = log.lines().filter_map(|line| line.split_once("\"GET /v2/"));
        let blobs = requests.filter_map(|(_, request)| request.split_once("/blobs/"));
        blobs.filter_map(|(_, rest)| rest.split([' ', '?']).next()).map(str::to_owned).collect()
    }

    /// Stops it.
    pub fn stop(&mut self) -> Result<()> {
        self.server.kill()
    }

    /// Starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.server = serve(self.node, self.port)?;
        Ok(())
    }
}

/// Pulls an image for the snapshotter `godwit`, and returns how long that took.
pub fn pull(node: &Node, reference: &str) -> Result<Duration> {
    let begun = Instant::now();
    // By itself, the client of containerd 1.7 would fetch everything before anything is unpacked.
    let platform = images::platform();
    let service = ["ctr", "images", "pull", "--local=false", "--platform", &platform];
    let words = [&service[..], &["--snapshotter", "godwit", reference]].concat();
    node.command(&words).timeout(PULL_TIMEOUT).ok()?;
    Ok(begun.elapsed())
}

fn serve(node: &Node, port: u16) -> Result<Background> {
    let text = format!(
        "version: 0.1\n\
         log: {{accesslog: {{disabled: false}}, level: error}}\n\
         storage: {{filesystem: {{rootdirectory: /var/lib/registry}}, delete: {{enabled: true}}}}\n\
         http: {{addr: \":{port}\", tls: {{certificate: {CERTIFICATE}, key: {KEY}}}}}\n"
    );
    fs::write(node.path(CONFIGURATION), text)?;
    let server = node.spawn(&["docker-registry", "serve", CONFIGURATION], LOG)?;
    wait_until("the registry answers", START_TIMEOUT, || {
        node.in_network(|| Ok(std::net::TcpStream::connect((node.address(), port)).is_ok()))
    })?;
    Ok(server)
}

//! What the kernel says of callers, and what it lets in.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use countersign_attestors::observers::look_here;
use countersign_attestors::{EvidenceError, PeerEvidence, has_cgroup2};

use super::agent::Running;
use super::finding::{Finding, FindingCode};
use crate::config::{Bind, Config};
use crate::hardening;

/// The settings of IPv4 by interface (Documentation/networking/ip-sysctl.rst).
const IPV4_INTERFACES: &str = "/proc/sys/net/ipv4/conf";

/// Asks the kernel what the agent will ask it, about this process.
pub(super) fn check(config: &Config, running: &Running) -> Vec<Finding> {
    let mut findings = Vec::new();
    route_localnet(config, &mut findings);
    // Without these no attestor asks the kernel.
    if !(config.attestors.unix || config.attestors.systemd) {
        return findings;
    }
    let listens_on_unix = config
        .listeners
        .iter()
        .any(|listener| matches!(listener.bind, Bind::Unix(_)));
    let listens_on_loopback = config
        .listeners
        .iter()
        .any(|listener| matches!(listener.bind, Bind::Tcp(address) if is_loopback(address)));
    if listens_on_unix {
        findings.extend(judge("a Unix socket", of_unix()));
    }
    if listens_on_loopback {
        findings.extend(judge("loopback TCP", of_loopback()));
        if !has_cgroup2() {
            findings.push(Finding::new(
                FindingCode::KernelWithoutCgroup2,
                "no cgroup-v2 file system is mounted: the caller on TCP is looked for among all processes, which takes longer",
            ));
        }
    }
    let held = running
        .observer_capabilities()
        .unwrap_or_else(hardening::observer_capabilities);
    let hidden = hardening::hidden_callers(config, &held);
    findings.extend(hidden.map(|hidden| Finding::new(FindingCode::CallersHidden, hidden)));
    findings
}

/// 127.0.0.0/8 from outside is dropped as martian, unless an interface routes it (CVE-2020-8558).
fn route_localnet(config: &Config, findings: &mut Vec<Finding>) {
    let on_loopback: Vec<String> = config
        .listeners
        .iter()
        .filter_map(|listener| match listener.bind {
            Bind::Tcp(address) => Some((listener.name.as_str(), address)),
            Bind::Unix(_) => None,
        })
        .chain(
            config
                .admin
                .metrics_bind
                .map(|address| ("metrics", address)),
        )
        .filter(|(_, address)| matches!(address.ip(), IpAddr::V4(ip) if ip.is_loopback()))
        .map(|(name, _)| format!("`{name}`"))
        .collect();
    if on_loopback.is_empty() {
        return;
    }
    let mut routed: Vec<String> = std::fs::read_dir(IPV4_INTERFACES)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|interface| is_set(&interface.path().join("route_localnet")))
        .map(|interface| interface.file_name().to_string_lossy().into_owned())
        // What comes in by loopback is from here in any case, and a new interface's default harms when there is one.
        .filter(|interface| interface != "lo" && interface != "default")
        .collect();
    routed.sort();
    if !routed.is_empty() {
        findings.push(Finding::new(
            FindingCode::RouteLocalnet,
            format!(
                "`net.ipv4.conf.{}.route_localnet` is set, and {} listens on loopback: packets for it may come from the network",
                routed.join(","),
                on_loopback.join(", ")
            ),
        ));
    }
}

fn is_set(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|value| value.trim() != "0")
}

fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

fn judge(by: &str, evidence: Result<PeerEvidence, EvidenceError>) -> Option<Finding> {
    match evidence {
        Err(error) => Some(Finding::new(
            FindingCode::KernelEvidenceMissing,
            format!("who calls over {by} is not found out: {error}"),
        )),
        Ok(evidence) if evidence.words().contains(&"weaker:peercred") => Some(Finding::new(
            FindingCode::KernelEvidenceWeaker,
            format!("who calls over {by} is found by SO_PEERCRED: the kernel lacks SO_PEERPIDFD"),
        )),
        Ok(_) => None,
    }
}

fn of_unix() -> Result<PeerEvidence, EvidenceError> {
    let (ours, _theirs) = UnixStream::pair()?;
    look_here(PeerEvidence::of_unix_stream(ours.as_fd()))
}

fn of_loopback() -> Result<PeerEvidence, EvidenceError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let caller = TcpStream::connect(listener.local_addr()?)?;
    let (ours, _) = listener.accept()?;
    let evidence = look_here(PeerEvidence::of_loopback_tcp(&ours))?;
    // A caller that is gone is not found.
    drop(caller);
    Ok(evidence)
}

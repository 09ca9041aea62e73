//! Systems whose kernel is not asked: there is no kernel evidence, and no value of these types.

use std::io;
use std::net::TcpStream;
#[cfg(unix)]
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::cgroup::Cgroups;
use crate::evidence::EvidenceError;
use crate::workload::AttestationEnded;

/// Other systems have no cgroups.
pub fn has_cgroup2() -> bool {
    false
}

#[derive(Debug)]
pub(crate) enum Peer {}

impl Peer {
    #[cfg(unix)]
    pub(crate) async fn of_unix_stream(
        _stream: BorrowedFd<'_>,
    ) -> Result<Option<Self>, EvidenceError> {
        Ok(None)
    }

    pub(crate) async fn of_loopback_tcp(
        _stream: &TcpStream,
    ) -> Result<Option<Self>, EvidenceError> {
        Ok(None)
    }

    pub(crate) fn process(&self) -> Option<&Process> {
        match *self {}
    }

    pub(crate) fn words(&self) -> &[&'static str] {
        match *self {}
    }

    pub(crate) fn check_liveness(&self) -> Result<(), AttestationEnded> {
        match *self {}
    }
}

/// A process that held a caller's socket. This system has none to show.
#[derive(Debug)]
pub enum Process {}

#[expect(missing_docs, reason = "documented where they can be called")]
impl Process {
    pub fn pid(&self) -> u32 {
        match *self {}
    }

    pub fn uid(&self) -> u32 {
        match *self {}
    }

    pub fn gid(&self) -> u32 {
        match *self {}
    }

    pub fn groups(&self) -> io::Result<Vec<u32>> {
        match *self {}
    }

    pub fn exec_is_seen(&self) -> bool {
        match *self {}
    }

    pub(crate) fn cgroups(&self) -> io::Result<Arc<Cgroups>> {
        match *self {}
    }

    pub fn command_line(&self) -> io::Result<Vec<u8>> {
        match *self {}
    }

    pub fn network_namespace(&self) -> io::Result<u64> {
        match *self {}
    }

    pub fn executable(&self) -> io::Result<Option<PathBuf>> {
        match *self {}
    }

    pub fn executable_sha256(&self) -> io::Result<Option<[u8; 32]>> {
        match *self {}
    }

    pub fn check_liveness(&self) -> Result<(), AttestationEnded> {
        match *self {}
    }
}

//! The readers of what the kernel writes, for fuzzing and measuring from outside of this crate: plain
//! values out.

use std::io;
use std::net::SocketAddr;

use crate::cgroup;
use crate::platform;

/// What a `/proc/PID/cgroup` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupReading {
    /// The path that stands for the process.
    pub path: Option<String>,
    /// The container's id and runtime, or the contradiction between hierarchies.
    pub container: Result<Option<(String, Option<String>)>, String>,
    /// The unit of the system's manager.
    pub system_unit: Option<String>,
    /// The unit of a user's manager.
    pub user_unit: Option<String>,
    /// Whose manager.
    pub user_id: Option<u32>,
}

/// Reads `/proc/PID/cgroup`.
pub fn cgroup(file: &[u8]) -> CgroupReading {
    let cgroups = cgroup::Cgroups::read(file);
    CgroupReading {
        path: cgroups.path,
        container: cgroups
            .container
            .map(|container| {
                let named = |container: cgroup::Container| {
                    let runtime = container.runtime.map(|runtime| runtime.to_string());
                    (container.id, runtime)
                };
                container.map(named)
            })
            .map_err(|contradiction| contradiction.to_string()),
        system_unit: cgroups.units.system,
        user_unit: cgroups.units.user,
        user_id: cgroups.units.user_id,
    }
}

/// Reads the effective uid and gid and the groups out of `/proc/PID/status`.
pub fn process_status(file: &[u8]) -> Option<(u32, u32, Vec<u32>)> {
    let status = platform::parse_status(file)?;
    let credentials = status.credentials;
    Some((credentials.uid, credentials.gid, status.groups))
}

/// What sock_diag answered about a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketReading {
    /// Its inode.
    pub inode: u32,
    /// Its owner.
    pub uid: u32,
    /// The cgroup in which it was made.
    pub cgroup_id: Option<u64>,
}

/// Reads a netlink message about the socket at `caller` that is connected to `listener`.
///
/// # Errors
/// The kernel's own, or that the message is malformed.
pub fn socket_answer(
    message: &[u8],
    caller: SocketAddr,
    listener: SocketAddr,
) -> io::Result<Option<SocketReading>> {
    let socket = platform::read_answer(message, caller, listener)?;
    Ok(socket.map(SocketReading::from))
}

/// Asks the kernel about the socket at `caller` that is connected to `listener`.
///
/// # Errors
/// The kernel's own.
pub fn tcp_socket(caller: SocketAddr, listener: SocketAddr) -> io::Result<Option<SocketReading>> {
    let socket = platform::find_tcp(caller, listener)?;
    Ok(socket.map(SocketReading::from))
}

impl From<platform::TcpSocket> for SocketReading {
    fn from(socket: platform::TcpSocket) -> Self {
        Self {
            inode: socket.inode,
            uid: socket.uid,
            cgroup_id: socket.cgroup_id,
        }
    }
}

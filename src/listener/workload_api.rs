//! The workload API: what a workload may ask the agent about itself.

use std::sync::Arc;

use countersign_attestors::evidence::EvidenceError;
use countersign_attestors::{Catalog, ConnectionAttestation};

use super::Socket;
use crate::agent::Agent;
use crate::telemetry::metrics::OpenConnection;

/// Serves one connection.
pub(super) async fn serve(
    _agent: Arc<Agent>,
    _listener: Arc<str>,
    _attestation: Result<ConnectionAttestation, EvidenceError>,
    _catalog: Arc<Catalog>,
    _socket: Socket,
    _open: OpenConnection,
) {
}

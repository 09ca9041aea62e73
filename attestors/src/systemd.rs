//! The `systemd` attestor: the unit of the calling process. Its page is `docs/systemd.md`.

use std::collections::BTreeMap;

use async_trait::async_trait;

use crate::attestor::{Attestation, Attestor, AttributeDeclaration, Evidence, EvidenceKind};
use crate::attribute::{AttributeType, AttributeValue, Attributes};
use crate::workload::FailureKind;

/// States the group `systemd`, for processes that belong to a unit.
#[derive(Debug, Default)]
pub struct SystemdAttestor {}

impl SystemdAttestor {
    /// The attestor. It has no settings: the unit is read from the process's cgroup.
    pub fn new() -> Self {
        Self {}
    }
}

#[async_trait]
impl Attestor for SystemdAttestor {
    fn name(&self) -> &str {
        "systemd"
    }

    fn evidence_kind(&self) -> EvidenceKind {
        EvidenceKind::Kernel
    }

    fn declarations(&self) -> Vec<AttributeDeclaration> {
        [
            (
                "system_unit",
                AttributeType::String,
                true,
                "the unit of the system's manager, such as `orders.service`",
            ),
            (
                "user_unit",
                AttributeType::String,
                false,
                "the unit of a user's own manager; that user can forge it",
            ),
            (
                "user_unit_uid",
                AttributeType::Long,
                false,
                "the user whose manager `user_unit` belongs to",
            ),
        ]
        .map(
            |(name, attribute_type, required, description)| AttributeDeclaration {
                group: "systemd".to_owned(),
                name: name.to_owned(),
                attribute_type,
                required,
                description: description.to_owned(),
            },
        )
        .to_vec()
    }

    async fn attest(&self, evidence: Evidence<'_>) -> Attestation {
        let Evidence::Kernel(peer) = evidence else {
            return Attestation::NotApplicable;
        };
        let Some(process) = peer.process() else {
            return Attestation::NotApplicable;
        };
        let cgroups = match process.cgroups() {
            Ok(cgroups) => cgroups,
            Err(error) => {
                return Attestation::Failed {
                    kind: FailureKind::CouldNotRun,
                    detail: format!("the process's cgroups could not be read: {error}"),
                };
            }
        };
        let units = &cgroups.units;
        let Some(system_unit) = units.system.clone() else {
            return Attestation::NotApplicable;
        };
        let mut attributes = Attributes::from([(
            "system_unit".to_owned(),
            AttributeValue::String(system_unit),
        )]);
        if let (Some(unit), Some(uid)) = (units.user.clone(), units.user_id) {
            attributes.insert("user_unit".to_owned(), AttributeValue::String(unit));
            attributes.insert("user_unit_uid".to_owned(), AttributeValue::Long(uid.into()));
        }
        Attestation::Attested {
            groups: BTreeMap::from([("systemd".to_owned(), attributes)]),
            valid_until: None,
        }
    }
}

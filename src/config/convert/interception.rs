//! `interception`.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Converter, DEFAULT_STATE_DIRECTORY};
use crate::config::reader::Located;
use crate::config::{CaSource, Destination, Interception, Listener, ListenerKind, Scheme, raw};
use crate::tls::interception::holds_key;

impl Converter<'_> {
    pub(super) fn interception(
        &mut self,
        written: Option<Located<raw::Interception>>,
        listeners: &[Listener],
        destinations: &[Arc<Destination>],
    ) -> Option<Interception> {
        let generated = || CaSource::Generated {
            state_directory: PathBuf::from(DEFAULT_STATE_DIRECTORY),
        };
        let Some(Located { value: written, .. }) = written else {
            let has_proxy = listeners
                .iter()
                .any(|listener| listener.kind == ListenerKind::ForwardProxy);
            let has_secret = destinations.iter().any(|destination| {
                destination.scheme == Scheme::Https && !destination.credentials.is_empty()
            });
            return (has_proxy && has_secret).then(|| Interception {
                source: generated(),
                ca_certificate_file: None,
                trust_bundle_file: None,
            });
        };
        let source = match written.ca {
            None => generated(),
            Some(ca) => self.certificate_authority(ca).unwrap_or_else(generated),
        };
        Some(Interception {
            source,
            ca_certificate_file: self.output_file(written.ca_certificate_file.as_ref()),
            trust_bundle_file: self.output_file(written.trust_bundle_file.as_ref()),
        })
    }

    pub(super) fn certificate_authority(
        &mut self,
        Located {
            value: written,
            place,
        }: Located<raw::CertificateAuthority>,
    ) -> Option<CaSource> {
        let source = written
            .source
            .as_ref()
            .map_or(raw::CaSourceName::Generated, |source| source.value);
        let at = written.source.as_ref().map_or(place, |source| source.place);
        if source != raw::CaSourceName::Generated {
            self.not_applicable(
                "state_directory",
                written.state_directory.as_ref(),
                "it belongs to `generated`",
            );
        }
        if source != raw::CaSourceName::Files {
            self.not_applicable(
                "certificate_file",
                written.certificate_file.as_ref(),
                "it belongs to `files`",
            );
            self.not_applicable(
                "key_file",
                written.key_file.as_ref(),
                "it belongs to `files`",
            );
        }
        match source {
            raw::CaSourceName::Generated => Some(CaSource::Generated {
                state_directory: self
                    .output_file(written.state_directory.as_ref())
                    .unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIRECTORY)),
            }),
            raw::CaSourceName::Memory => Some(CaSource::Memory),
            raw::CaSourceName::Files => {
                if written.certificate_file.is_none() {
                    self.missing(
                        "certificate_file",
                        place,
                        at,
                        "`files` reads the intermediate there",
                    );
                }
                if written.key_file.is_none() {
                    self.missing(
                        "key_file",
                        place,
                        at,
                        "`files` reads the intermediate's key there",
                    );
                }
                let certificate_file = self.ca_file(written.certificate_file.as_ref());
                let key_file = self.checked_secret_file(
                    written.key_file.as_ref(),
                    "invalid_authority_key_file",
                    "name the private key of the intermediate in `certificate_file`",
                    |content| match holds_key(content) {
                        true => Ok(()),
                        false => Err("it holds no private key in PEM".to_owned()),
                    },
                );
                Some(CaSource::Files {
                    certificate_file: certificate_file?,
                    key_file: key_file?,
                })
            }
        }
    }
}

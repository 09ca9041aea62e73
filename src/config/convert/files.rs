//! Files that the configuration names.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::Converter;
use crate::config::load::reason;
use crate::config::raw::Text;
use crate::config::{SigningAlgorithm, text};
use crate::jwt::SigningKey;
use crate::secret_file;

impl Converter<'_> {
    pub(super) fn resolve(&self, written: &Text) -> PathBuf {
        self.files.get(written.place.file).map_or_else(
            || PathBuf::from(&written.value),
            |file| file.directory.join(&written.value),
        )
    }

    /// A path that is written by the agent: it need not exist.
    pub(super) fn output_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        let written = written?;
        self.parse(written, text::plain)?;
        Some(self.resolve(written))
    }

    /// A file that is read, and watched for changes.
    pub(super) fn input_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        let path = self.output_file(written)?;
        let written = written?;
        self.watched.add(&path);
        let opened = std::fs::File::open(&path).and_then(|file| {
            if file.metadata()?.is_dir() {
                Err(std::io::ErrorKind::IsADirectory.into())
            } else {
                Ok(())
            }
        });
        match opened {
            Ok(()) => Some(path),
            Err(error) => {
                self.error(
                    "unreadable_file",
                    written.place,
                    format!("`{}` cannot be read: {}", path.display(), reason(&error)),
                    "name a file that this user may read; a relative path begins at the directory of this file",
                );
                None
            }
        }
    }

    /// A file that holds a secret: nobody but its owner should read it.
    pub(super) fn secret_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        let path = self.input_file(written)?;
        let mode = std::fs::metadata(&path).map_or(0, |metadata| metadata.permissions().mode());
        if let Some(written) = written
            && mode & 0o077 != 0
        {
            self.warning(
                "secret_file_open_to_others",
                written.place,
                format!(
                    "`{}` has mode {:04o}: others than its owner may use it",
                    path.display(),
                    mode & 0o7777
                ),
                format!("run `chmod 0600 {}`", path.display()),
            );
        }
        Some(path)
    }

    /// A file that holds a private key for `algorithm`.
    pub(super) fn key_file(
        &mut self,
        written: Option<&Text>,
        algorithm: Option<SigningAlgorithm>,
    ) -> Option<PathBuf> {
        let path = self.secret_file(written)?;
        if let (Some(written), Some(algorithm)) = (written, algorithm)
            && let Err(cause) = secret_file::read(&path)
                .map_err(|error| reason(&error))
                .and_then(|content| {
                    SigningKey::parse(&content, algorithm).map_err(|error| error.to_string())
                })
        {
            self.error(
                "invalid_key_file",
                written.place,
                format!("`{}` cannot be used: {cause}", path.display()),
                "name a private key of the `algorithm`, in PEM or as a JWK; `countersign keys generate` makes one",
            );
        }
        Some(path)
    }

    /// A file that holds a password, alone.
    pub(super) fn password_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        let path = self.secret_file(written)?;
        if let Some(written) = written
            && let Err(cause) = secret_file::read(&path)
                .map_err(|error| reason(&error))
                .and_then(|content| {
                    secret_file::secret_in(&content)
                        .map(drop)
                        .ok_or_else(|| "it is empty".to_owned())
                })
        {
            self.error(
                "invalid_secret_file",
                written.place,
                format!("`{}` cannot be used: {cause}", path.display()),
                "write the client's secret into it, alone",
            );
        }
        Some(path)
    }

    /// A PEM file with at least one certificate.
    pub(super) fn ca_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        let path = self.input_file(written)?;
        let certificates = CertificateDer::pem_file_iter(&path)
            .ok()
            .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>().ok())
            .unwrap_or_default();
        if certificates.is_empty()
            && let Some(written) = written
        {
            self.error(
                "invalid_certificate_file",
                written.place,
                format!("`{}` holds no PEM certificate", path.display()),
                "name a file with `-----BEGIN CERTIFICATE-----`",
            );
        }
        Some(path)
    }
}

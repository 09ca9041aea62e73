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
    fn secret_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
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

    /// A secret file whose content passes `check`; else an error with `code`.
    pub(super) fn checked_secret_file(
        &mut self,
        written: Option<&Text>,
        code: &'static str,
        next: &'static str,
        check: impl FnOnce(&[u8]) -> Result<(), String>,
    ) -> Option<PathBuf> {
        let path = self.secret_file(written)?;
        let checked = secret_file::read(&path)
            .map_err(|error| reason(&error))
            .and_then(|content| check(&content));
        if let (Some(written), Err(cause)) = (written, checked) {
            self.error(
                code,
                written.place,
                format!("`{}` cannot be used: {cause}", path.display()),
                next,
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
        let Some(algorithm) = algorithm else {
            return self.secret_file(written);
        };
        self.checked_secret_file(
            written,
            "invalid_key_file",
            "name a private key of the `algorithm`, in PEM or as a JWK; `countersign keys generate` makes one",
            |content| {
                SigningKey::parse(content, algorithm)
                    .map(drop)
                    .map_err(|error| error.to_string())
            },
        )
    }

    /// A file that holds a client secret, alone.
    pub(super) fn client_secret_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        self.checked_secret_file(
            written,
            "invalid_secret_file",
            "write the client's secret into it, alone",
            |content| {
                secret_file::secret_in(content)
                    .map(drop)
                    .ok_or_else(|| "it is empty".to_owned())
            },
        )
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

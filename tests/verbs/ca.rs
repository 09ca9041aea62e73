//! `countersign ca`: certificates in the forms that clients load, and nothing that is secret.

use std::process::Output;

use crate::exec::Running;
use crate::program::finish;
use crate::support::counts::reached;
use crate::support::has_program;

const API: &str = "https://orders.example.test/v1/orders";

async fn certificates(running: &Running, arguments: &[&str]) -> Vec<u8> {
    let line = [&["ca"], arguments].concat();
    let Output {
        status,
        stdout,
        stderr,
    } = running.user.countersign(&line).output().await.unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let text = String::from_utf8_lossy(&stdout);
    assert!(!text.contains("PRIVATE"), "{arguments:?}");
    stdout
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_is_what_clients_load_and_holds_no_key() {
    let running = Running::with("").await;
    let config = running.world.path("countersign.yaml").display().to_string();
    let ours = std::fs::read_to_string(running.world.path("ca.pem")).unwrap();
    let mut forms = 0;
    // Of the agent that runs, and of its files.
    for source in [["--agent", &running.agent], ["--config", &config]] {
        let of = |format| {
            let arguments = [&source[..], &["--format", format]].concat();
            let running = &running;
            async move { certificates(running, &arguments).await }
        };
        let pem = of("pem").await;
        assert_eq!(String::from_utf8(pem.clone()).unwrap(), ours);
        assert_eq!(certificates(&running, &source).await, pem, "the default");
        let bundle = String::from_utf8(of("bundle").await).unwrap();
        assert!(bundle.contains(ours.trim()));
        let count = bundle.matches("BEGIN CERTIFICATE").count();
        assert!(count > 1, "the system's roots are in the bundle");
        forms += 2;

        // curl with nothing but the bundle trusts the agent's root.
        let file = running
            .user
            .write("bundle.pem", &bundle)
            .display()
            .to_string();
        let mut curl = running.user.command("curl");
        curl.args([
            "-sS",
            "--fail",
            "-x",
            &running.world.proxy(),
            "--cacert",
            &file,
            API,
        ]);
        finish(curl).await.expect(0);

        let store = of("pkcs12").await;
        std::fs::write(running.user.path("trust.p12"), store).unwrap();
        if has_program("ca", "openssl") {
            let read = running
                .user
                .sh("openssl pkcs12 -in trust.p12 -passin pass:changeit -nodes")
                .await
                .expect(0);
            assert_eq!(read.out.matches("BEGIN CERTIFICATE").count(), count);
            assert!(!read.out.contains("PRIVATE KEY"));
            forms += 1;
        }
        // Where there is a Java, it takes every entry for a trusted one.
        let listed = running
            .user
            .sh("command -v keytool >/dev/null || exit 3; keytool -list -keystore trust.p12 -storepass changeit")
            .await;
        if listed.code != 3 {
            assert_eq!(listed.code, 0, "{listed:#?}");
            assert_eq!(listed.out.matches("trustedCertEntry").count(), count);
        }
    }
    reached("certificate_forms", forms);
    assert_eq!(running.world.api.seen().len(), 2);
}

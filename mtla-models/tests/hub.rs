//! Models from a hub: a server of this test's own that answers as the hub does, whole or not.

#![cfg(feature = "hub")]

mod hub_server;

use hub_server::{COMMIT, Server, Trick};
use mtla_models::hub::{Hub, HubError, HubModel, ModelSource};
use std::{
    fs,
    net::TcpListener,
    path::Path,
    sync::{Arc, Mutex},
};
use tempfile::TempDir;

fn weights() -> Vec<u8> {
    (0..1_000_000_u32).map(|i| (i / 7) as u8).collect()
}

fn server() -> Server {
    Server::start(&[
        ("config.json", b"{\"model_type\": \"llama-mtla\"}"),
        ("model.safetensors", &weights()),
        ("tokenizer.json", b"{}"),
        ("empty.json", b""),
        ("README.md", b"not for us"),
        ("pytorch_model.bin", b"not for us"),
    ])
}

fn model() -> HubModel {
    HubModel::parse("owner/tiny").unwrap()
}

/// A hub with an empty cache.
fn hub(server: &Server) -> (Hub, TempDir) {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::from_env().unwrap();
    let hub = hub
        .with_endpoint(&server.endpoint())
        .with_cache(cache.path());
    (hub.with_token(None).with_progress(|_| ()), cache)
}

fn is_whole(directory: &Path) -> bool {
    let weights_are = fs::read(directory.join("model.safetensors")).is_ok_and(|is| is == weights());
    weights_are && directory.join("config.json").exists() && directory.join("empty.json").exists()
}

/// All files of the cache but locks.
fn contents(cache: &TempDir) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![cache.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_none_or(|ending| ending != "lock") {
                names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    names.sort();
    names
}

#[test]
fn a_model_is_fetched_once_and_only_what_is_of_use() {
    let server = server();
    let (hub, _cache) = hub(&server);
    let source = ModelSource::parse("hub:owner/tiny").unwrap();
    let directory = source.resolve_with(&hub).unwrap();
    assert!(is_whole(&directory));
    assert!(directory.ends_with(format!("models--owner--tiny/snapshots/{COMMIT}")));
    assert!(!directory.join("README.md").exists());
    assert!(!directory.join("pytorch_model.bin").exists());

    // The second time only the list of files is asked for, and with a commit nothing at all.
    server.requests();
    assert_eq!(hub.fetch(&model()).unwrap(), directory);
    assert_eq!(server.requests().len(), 1);
    let commit = HubModel::parse(&format!("owner/tiny@{COMMIT}")).unwrap();
    assert_eq!(hub.fetch(&commit).unwrap(), directory);
    server.requests();
    assert_eq!(hub.fetch(&commit).unwrap(), directory);
    assert_eq!(server.requests().len(), 0);
}

/// What is fetched is a model that computes what it computes where it came from.
#[cfg(all(feature = "files", feature = "flex"))]
#[test]
fn a_model_is_fetched_and_loaded() {
    use burn::tensor::{Int, Tensor};
    use burn_flex::{Flex, FlexDevice};
    use mtla_models::{decoder::DecoderInput, llama::Llama};

    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama_mtla/s2");
    let files: Vec<(String, Vec<u8>)> = fs::read_dir(fixture)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect();
    let served: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (&**n, &**b)).collect();
    let server = Server::start(&served);
    let (hub, _cache) = hub(&server);
    let source = ModelSource::parse("hub:owner/tiny").unwrap();
    let fetched = source.resolve_with(&hub).unwrap();
    let logits = [Path::new(fixture), &fetched].map(|directory| {
        let llama = Llama::<Flex>::from_pretrained(directory, &FlexDevice).unwrap();
        let ids = Tensor::<Flex, 2, Int>::from_data([[1, 5, 9, 250, 17]], &FlexDevice);
        llama.decoder.forward(DecoderInput::new(ids)).into_data()
    });
    assert_eq!(logits[0], logits[1]);
    assert!(logits[0].iter::<f32>().any(|x| x.abs() > 1e-3));
}

#[test]
fn progress_is_told() {
    let server = server();
    let (hub, _cache) = hub(&server);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&seen);
    let hub = hub.with_progress(move |progress| {
        let step = (progress.file.to_owned(), progress.received, progress.size);
        record.lock().unwrap().push(step);
    });
    hub.fetch(&model()).unwrap();
    let seen = seen.lock().unwrap();
    let of = |name: &str| {
        seen.iter()
            .filter(|step| step.0 == name)
            .collect::<Vec<_>>()
    };
    let steps = of("model.safetensors");
    assert!(steps.len() > 2 && steps.windows(2).all(|pair| pair[0].1 <= pair[1].1));
    assert_eq!((steps[0].1, steps[steps.len() - 1].1), (0, 1_000_000));
    assert!(steps.iter().all(|step| step.2 == 1_000_000));
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let server = server();
    let (hub, cache) = hub(&server);
    server.play(Trick::CloseHalfWay("model.safetensors"));
    let error = hub.fetch(&model()).unwrap_err();
    assert!(
        matches!(
            error,
            HubError::Interrupted {
                size: 1_000_000,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(
        error
            .to_string()
            .contains("model.safetensors of hub:owner/tiny@main"),
        "{error}"
    );
    assert!(!contents(&cache).contains(&"model.safetensors".to_owned()));
    assert!(
        !contents(&cache).contains(&"main".to_owned()),
        "the model has no name yet"
    );

    server.play(Trick::None);
    server.requests();
    assert!(is_whole(&hub.fetch(&model()).unwrap()));
    let requests = server.requests();
    let ranges = requests
        .iter()
        .filter(|request| request.path.starts_with("/cdn/model"));
    let ranges: Vec<&str> = ranges
        .map(|request| request.header("range").unwrap())
        .collect();
    assert!(!ranges.contains(&"bytes=0-"), "{ranges:?}");
    assert!(!contents(&cache).iter().any(|name| name.ends_with("part")));
}

#[test]
fn a_connection_that_breaks_once_is_made_anew() {
    let server = server();
    let (hub, _cache) = hub(&server);
    server.play(Trick::CloseHalfWayOnce("model.safetensors"));
    assert!(is_whole(&hub.fetch(&model()).unwrap()));
}

#[test]
fn a_server_that_starts_over_is_understood() {
    let server = server();
    let (hub, _cache) = hub(&server);
    server.play(Trick::CloseHalfWay("model.safetensors"));
    hub.fetch(&model()).unwrap_err();
    server.play(Trick::NoRanges);
    assert!(is_whole(&hub.fetch(&model()).unwrap()));
}

#[test]
fn wrong_contents_leave_nothing_in_the_cache() {
    for name in ["model.safetensors", "config.json"] {
        let server = server();
        let (hub, cache) = hub(&server);
        server.play(Trick::OtherBytes(name));
        let error = hub.fetch(&model()).unwrap_err();
        assert!(matches!(error, HubError::Checksum { .. }), "{error:?}");
        assert!(error.to_string().contains(name), "{error}");
        let left = contents(&cache);
        assert!(
            !left
                .iter()
                .any(|left| left == name || left.ends_with("part")),
            "{left:?}"
        );

        server.play(Trick::None);
        assert!(is_whole(&hub.fetch(&model()).unwrap()));
    }
}

#[test]
fn wrong_bytes_of_an_earlier_attempt_are_found_out() {
    let server = server();
    let (hub, cache) = hub(&server);
    server.play(Trick::CloseHalfWay("model.safetensors"));
    hub.fetch(&model()).unwrap_err();
    let blobs = cache.path().join("models--owner--tiny/blobs");
    let mut parts = fs::read_dir(blobs)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let part = parts
        .find(|path| path.extension().is_some_and(|e| e == "part"))
        .unwrap();
    let mut bytes = fs::read(&part).unwrap();
    bytes[10] ^= 1;
    fs::write(&part, bytes).unwrap();

    server.play(Trick::None);
    let error = hub.fetch(&model()).unwrap_err();
    assert!(matches!(error, HubError::Checksum { .. }), "{error:?}");
    assert!(is_whole(&hub.fetch(&model()).unwrap()));
}

#[test]
fn longer_files_than_promised_are_refused() {
    let server = server();
    let (hub, cache) = hub(&server);
    server.play(Trick::MoreBytes("model.safetensors"));
    let error = hub.fetch(&model()).unwrap_err();
    assert!(
        error.to_string().contains("longer than the 1000000 bytes"),
        "{error}"
    );
    assert!(!contents(&cache).iter().any(|name| name.ends_with("part")));
}

#[test]
fn names_from_the_server_do_not_lead_out_of_the_cache() {
    for trick in [
        Trick::Etag("../../../outside"),
        Trick::Etag(".."),
        Trick::Commit("../../outside"),
    ] {
        let server = server();
        let (hub, cache) = hub(&server);
        server.play(trick);
        let error = hub.fetch(&model()).unwrap_err();
        assert!(matches!(error, HubError::Answer { .. }), "{error:?}");
        assert!(contents(&cache).is_empty());
    }
    let server = Server::start(&[("../outside.json", b"{}"), ("config.json", b"{}")]);
    let (hub, cache) = hub(&server);
    hub.fetch(&model()).unwrap();
    assert!(!contents(&cache).contains(&"outside.json".to_owned()));
}

#[test]
fn what_is_not_there_is_said() {
    let server = server();
    let (hub, cache) = hub(&server);
    for name in ["owner/other", "owner/tiny@no-such-branch"] {
        let error = hub.fetch(&HubModel::parse(name).unwrap()).unwrap_err();
        assert!(
            matches!(error, HubError::NotFound { status: 404, .. }),
            "{error:?}"
        );
        let message = error.to_string();
        assert!(
            message.contains(name) && message.contains("HF_TOKEN"),
            "{message}"
        );
    }
    server.play(Trick::Missing("model.safetensors"));
    let error = hub.fetch(&model()).unwrap_err().to_string();
    assert!(
        error.contains("model.safetensors of hub:owner/tiny@main"),
        "{error}"
    );
    server.play(Trick::Moved);
    assert!(matches!(
        hub.fetch(&model()).unwrap_err(),
        HubError::Changed { .. }
    ));
    assert!(!contents(&cache).contains(&"main".to_owned()));

    let nothing = Server::start(&[("README.md", b"")]);
    let error = hub
        .with_endpoint(&nothing.endpoint())
        .fetch(&model())
        .unwrap_err();
    assert!(matches!(error, HubError::Nothing { .. }));
}

#[test]
fn answers_that_are_none_are_errors() {
    for trick in [
        Trick::Garbage,
        Trick::RedirectToNowhere,
        Trick::RedirectForever,
    ] {
        let server = server();
        let (hub, _cache) = hub(&server);
        server.play(trick);
        let error = hub.fetch(&model()).unwrap_err();
        assert!(matches!(error, HubError::Answer { .. }), "{error:?}");
        assert!(error.to_string().contains(&server.endpoint()), "{error}");
    }
}

#[test]
fn without_network_the_cache_serves() {
    let server = server();
    let (hub, _cache) = hub(&server);
    let directory = hub.fetch(&model()).unwrap();

    // A port that nobody listens on.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let unreachable = hub.clone().with_endpoint(&endpoint);
    assert_eq!(unreachable.fetch(&model()).unwrap(), directory);
    server.requests();
    assert_eq!(hub.clone().offline().fetch(&model()).unwrap(), directory);
    assert_eq!(server.requests().len(), 0);

    // A server that is down is no network either.
    server.play(Trick::Down);
    assert_eq!(hub.fetch(&model()).unwrap(), directory);

    let other = HubModel::parse("owner/other").unwrap();
    for hub in [unreachable, hub.offline()] {
        let error = hub.fetch(&other).unwrap_err();
        assert!(matches!(error, HubError::Unreachable { .. }), "{error:?}");
        assert!(error.to_string().contains("owner/other"), "{error}");
    }
}

#[test]
fn the_token_is_for_the_hub_alone() {
    let server = server();
    let (hub, _cache) = hub(&server);
    server.play(Trick::Gated("secret"));
    let error = hub.fetch(&model()).unwrap_err();
    assert!(
        matches!(error, HubError::NotFound { status: 401, .. }),
        "{error:?}"
    );

    let hub = hub.with_token(Some("secret".to_owned()));
    server.requests();
    assert!(is_whole(&hub.fetch(&model()).unwrap()));
    for request in server.requests() {
        let elsewhere = request.path.starts_with("/cdn/");
        assert_eq!(
            request.header("authorization").is_none(),
            elsewhere,
            "{}",
            request.path
        );
    }
}

#[test]
fn two_that_fetch_at_once_get_the_same() {
    let server = server();
    let (hub, _cache) = hub(&server);
    std::thread::scope(|scope| {
        let fetches: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| hub.fetch(&model())))
            .collect();
        for fetch in fetches {
            assert!(is_whole(&fetch.join().unwrap().unwrap()));
        }
    });
}

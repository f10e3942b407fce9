//! A server that answers as the Hugging Face hub does: a list of files, small files itself, and large ones
//! by sending to another host.

use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

/// The commit of the one model.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// From this size on a file is large.
const LARGE: usize = 1000;

/// What the server does wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Trick {
    None,
    CloseHalfWay(&'static str),
    CloseHalfWayOnce(&'static str),
    NoRanges,
    OtherBytes(&'static str),
    MoreBytes(&'static str),
    Etag(&'static str),
    Commit(&'static str),
    Missing(&'static str),
    Moved,
    Garbage,
    RedirectToNowhere,
    RedirectForever,
    Down,
    Gated(&'static str),
}

/// A request that was made.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    /// The value of a header, whose name is given in small letters.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    fn read(stream: &TcpStream) -> Option<Self> {
        let mut lines = BufReader::new(stream).lines();
        let first = lines.next()?.ok()?;
        let path = first.split(' ').nth(1)?.to_owned();
        let lines = lines
            .map_while(Result::ok)
            .take_while(|line| !line.is_empty());
        let headers = lines.filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        });
        let headers = headers.collect();
        Some(Self { path, headers })
    }

    /// The first byte that is asked for, and whether it is the only one.
    fn range(&self) -> Option<(usize, bool)> {
        let range = self.header("range")?.strip_prefix("bytes=")?;
        let (first, last) = range.split_once('-')?;
        Some((first.parse().ok()?, !last.is_empty()))
    }
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    trick: Trick,
    requests: Vec<Request>,
}

/// The server; its thread ends with the test.
pub(crate) struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Server {
    pub(crate) fn start(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let files = files
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()));
        let state = Arc::new(Mutex::new(State {
            files: files.collect(),
            trick: Trick::None,
            requests: Vec::new(),
        }));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let state = Arc::clone(&shared);
                thread::spawn(move || serve(stream, address, &state));
            }
        });
        Self { address, state }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on, does this wrong.
    pub(crate) fn play(&self, trick: Trick) {
        self.state.lock().unwrap().trick = trick;
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

fn serve(mut stream: TcpStream, address: SocketAddr, state: &Mutex<State>) {
    let Some(request) = Request::read(&stream) else {
        return;
    };
    let answer = {
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        answer(&request, address, &mut state)
    };
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    let length = answer.promised.unwrap_or(answer.body.len());
    write!(head, "Content-Length: {length}\r\n\r\n").unwrap();
    // The client may have gone.
    stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(&answer.body))
        .ok();
}

#[derive(Default)]
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// The length that is announced, if it is another.
    promised: Option<usize>,
}

fn status(status: u16) -> Answer {
    Answer {
        status,
        ..Answer::default()
    }
}

fn answer(request: &Request, address: SocketAddr, state: &mut State) -> Answer {
    if let Some(name) = request.path.strip_prefix("/cdn/") {
        return contents(request, name, state);
    }
    match state.trick {
        Trick::Down => return status(503),
        Trick::Gated(token)
            if request.header("authorization") != Some(&format!("Bearer {token}")) =>
        {
            return status(401);
        }
        _ => {}
    }
    let revision = |rest: &str| matches!(rest, "main" | COMMIT);
    if let Some(rest) = request
        .path
        .strip_prefix("/api/models/owner/tiny/revision/")
    {
        return if revision(rest) {
            listing(state)
        } else {
            status(404)
        };
    }
    let file = request.path.strip_prefix("/owner/tiny/resolve/");
    match file.and_then(|rest| rest.split_once('/')) {
        Some((rest, name)) if revision(rest) => resolve(request, name, address, state),
        _ => status(404),
    }
}

fn listing(state: &State) -> Answer {
    let commit = match state.trick {
        Trick::Commit(commit) => commit,
        Trick::Garbage => {
            return Answer {
                body: b"<html>".to_vec(),
                ..status(200)
            };
        }
        _ => COMMIT,
    };
    let files = state
        .files
        .keys()
        .map(|name| serde_json::json!({"rfilename": name}));
    let list = serde_json::json!({"sha": commit, "siblings": files.collect::<Vec<_>>()});
    Answer {
        body: list.to_string().into_bytes(),
        ..status(200)
    }
}

/// The answer of the hub itself: the file, or where it is.
fn resolve(request: &Request, name: &str, address: SocketAddr, state: &mut State) -> Answer {
    let Some(bytes) = state.files.get(name) else {
        return status(404);
    };
    let large = bytes.len() >= LARGE;
    let etag = match (state.trick, large) {
        (Trick::Etag(etag), _) => etag.to_owned(),
        (_, true) => hex(&Sha256::digest(bytes)),
        (_, false) => {
            let git = Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
            hex(&git.chain_update(bytes).finalize())
        }
    };
    let commit = if matches!(state.trick, Trick::Moved) {
        "moved"
    } else {
        COMMIT
    };
    let size = bytes.len().to_string();
    let mut headers = vec![("X-Repo-Commit", commit.to_owned())];
    match state.trick {
        Trick::Missing(missing) if missing == name => return status(404),
        Trick::RedirectToNowhere => return status(302),
        Trick::RedirectForever => {
            headers.push(("Location", request.path.clone()));
            return Answer {
                headers,
                ..status(307)
            };
        }
        _ => {}
    }
    if large {
        headers.push(("X-Linked-Etag", format!("\"{etag}\"")));
        headers.push(("X-Linked-Size", size));
        // Another name for this machine: another host to the client.
        headers.push((
            "Location",
            format!("http://localhost:{}/cdn/{name}", address.port()),
        ));
        return Answer {
            headers,
            ..status(302)
        };
    }
    headers.push(("ETag", format!("\"{etag}\"")));
    let mut answer = contents(request, name, state);
    answer.headers.append(&mut headers);
    answer
}

fn contents(request: &Request, name: &str, state: &mut State) -> Answer {
    let Some(mut bytes) = state.files.get(name).cloned() else {
        return status(404);
    };
    let range = request
        .range()
        .filter(|_| !matches!(state.trick, Trick::NoRanges));
    let only_first = range.is_some_and(|(_, only)| only);
    match state.trick {
        Trick::OtherBytes(other) if other == name => bytes[0] ^= 1,
        Trick::MoreBytes(more) if more == name && !only_first => bytes.push(0),
        _ => {}
    }
    let total = bytes.len();
    let mut answer = match range {
        Some((first, _)) if first >= total => {
            let headers = vec![("Content-Range", format!("bytes */{total}"))];
            return Answer {
                headers,
                ..status(416)
            };
        }
        Some((first, only)) => {
            let last = if only { first } else { total - 1 };
            let range = format!("bytes {first}-{last}/{total}");
            Answer {
                headers: vec![("Content-Range", range)],
                body: bytes[first..=last].to_vec(),
                ..status(206)
            }
        }
        None => Answer {
            body: bytes,
            ..status(200)
        },
    };
    let half = matches!(state.trick, Trick::CloseHalfWay(half) | Trick::CloseHalfWayOnce(half) if half == name);
    if half && !only_first {
        if matches!(state.trick, Trick::CloseHalfWayOnce(_)) {
            state.trick = Trick::None;
        }
        answer.promised = Some(answer.body.len());
        answer.body.truncate(answer.body.len() / 2);
    }
    answer
}

fn hex(bytes: &[u8]) -> String {
    let hex = |byte: &u8| format!("{byte:02x}");
    bytes.iter().map(hex).collect()
}

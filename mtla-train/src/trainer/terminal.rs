//! The terminal under burn-train's text interface, which leaves three things to be done: Ctrl-C does
//! nothing in it, its thread takes a whole processor, and a panic leaves the cursor hidden.

use ratatui::crossterm::terminal::is_raw_mode_enabled;
use ratatui::crossterm::{cursor::Show, execute};
use std::io::{IsTerminal, stdout};
use std::time::{Duration, Instant};

/// To be called once the interface is under way; it starts in a thread of its own.
pub(super) fn settle() {
    let patience = Instant::now();
    while !is_raw_mode_enabled().unwrap_or(false) {
        if patience.elapsed() > Duration::from_secs(2) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    #[cfg(unix)]
    make_ctrl_c_a_signal();
    #[cfg(target_os = "linux")]
    yield_processor("train-renderer");
}

/// Leaves the alternate screen and raw mode and shows the cursor.
pub(super) fn restore() {
    if is_raw_mode_enabled().unwrap_or(false) {
        ratatui::restore();
    }
    if stdout().is_terminal() {
        execute!(stdout(), Show).ok();
    }
}

/// Raw mode makes Ctrl-C a key, which the interface ignores. It becomes a signal again, but not the
/// keys that suspend or abort: they would leave the terminal as it is.
#[cfg(unix)]
fn make_ctrl_c_a_signal() {
    use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};
    const DISABLED: u8 = 0;
    let input = std::io::stdin();
    if let Ok(mut modes) = tcgetattr(&input) {
        modes.local_modes |= LocalModes::ISIG;
        modes.special_codes[SpecialCodeIndex::VSUSP] = DISABLED;
        modes.special_codes[SpecialCodeIndex::VQUIT] = DISABLED;
        tcsetattr(&input, OptionalActions::Now, &modes).ok();
    }
}

/// The interface's thread looks for events without ever sleeping. With the lowest priority it takes
/// only what training leaves.
#[cfg(target_os = "linux")]
fn yield_processor(thread: &str) {
    use rustix::process::{Pid, setpriority_process};
    const LOWEST: i32 = 19;
    for task in std::fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let id = task
            .file_name()
            .to_str()
            .and_then(|id| Pid::from_raw(id.parse().ok()?));
        if name.trim_end() == thread && id.is_some() {
            setpriority_process(id, LOWEST).ok();
        }
    }
}

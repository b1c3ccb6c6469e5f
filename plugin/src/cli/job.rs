//! `virtseal jobs …`, and what starts a job.

use std::io::IsTerminal;

use clap::{Args, Subcommand};
use futures_util::{StreamExt, pin_mut};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::{SigHandler, Signal, raise, signal};

use super::client::{Client, silent};
use super::print::{Printer, progress};
use crate::api::{HostProxy, JobRequest, JobStarted, JobState, JobView, SweepKind};
use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem};
use crate::terminal::visible;

#[derive(Debug, Subcommand)]
pub(super) enum JobsCommand {
    /// List the last jobs, and outdated copies of envelopes.
    List,
    /// Follow a job, or the only one that runs, until it ends.
    Watch {
        /// Its number.
        #[arg(value_parser = number)]
        id: Option<i64>,
    },
    /// Stop a job, or the only one that runs. Envelopes that it has changed stay changed, an unfinished volume is removed, and an
    /// overlay that is not merged yet still has to be.
    Abort {
        /// Its number.
        #[arg(value_parser = number)]
        id: Option<i64>,
    },
    /// Start a job once more that was aborted, has failed or has left something behind.
    Resume {
        /// Its number.
        #[arg(value_parser = number)]
        id: i64,
        #[command(flatten)]
        watch: WatchArgs,
    },
}

fn number(text: &str) -> Result<i64, &'static str> {
    let given = text.parse::<i64>().ok().filter(|number| *number > 0);
    given.ok_or("the number of a job")
}

#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// Follow the job until it ends.
    #[arg(long)]
    watch: bool,
}

pub(super) async fn run(
    command: Option<JobsCommand>,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    match command {
        None | Some(JobsCommand::List) => {
            printer.jobs(client.call(async |host| host.list_jobs().await).await?)
        }
        Some(JobsCommand::Watch { id }) => {
            let last = follow(id, client, printer).await?;
            printer.job(last.clone())?;
            judge(&last)
        }
        Some(JobsCommand::Abort { id }) => {
            let aborted = client.call(async |host| host.abort_job(id).await).await?;
            printer.job_changed(aborted.job, true)
        }
        Some(JobsCommand::Resume { id, watch }) => {
            let resumed = client.call(async |host| host.resume_job(id).await).await?;
            started(resumed, &watch, client, printer).await
        }
    }
}

pub(super) fn request(
    kind: SweepKind,
    provider: Option<String>,
    to: Option<String>,
    vm: Option<String>,
) -> JobRequest {
    JobRequest {
        kind,
        provider,
        to,
        vm,
    }
}

pub(super) async fn start(
    request: &JobRequest,
    args: &WatchArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    let job = client.call(async |host| host.start_job(request).await).await?;
    started(job, args, client, printer).await
}

pub(super) async fn started(
    started: JobStarted,
    args: &WatchArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    printer.warn_all(&started.warnings);
    let id = started.job.id;
    if args.watch {
        let last = follow(Some(id), client, printer).await?;
        printer.job_changed(last.clone(), started.changed)?;
        return judge(&last);
    }
    let is_done = started.job.state.known() == Some(JobState::Done);
    printer.job_changed(started.job, started.changed)?;
    match is_done {
        true => Ok(()),
        false => printer.next(&Advice::WatchJob(id)),
    }
}

/// Ends like the job: whatever it left behind, or undone, is a failure.
pub(super) fn judge(job: &JobView) -> Result<(), Problem> {
    ended(job).map_err(|problem| problem.about(Subject::Job(job.id)))
}

fn ended(job: &JobView) -> Result<(), Problem> {
    let resume = Advice::from("fix what it says").then(Advice::ResumeJob(job.id));
    match job.state.known() {
        Some(JobState::Done) => Ok(()),
        Some(JobState::Incomplete) => Err(Problem::failed(format!(
            "job {} left {} envelopes behind: {}",
            job.id,
            job.left,
            job.reasons.join("; ")
        ))
        .next(resume)),
        Some(JobState::Failed) => match &job.problem {
            Some(problem) => {
                let problem = Problem::from(problem.clone());
                let next = problem.advice.clone().unwrap_or(resume);
                Err(problem.next(next))
            }
            None => Err(Problem::failed(format!("job {} has failed", job.id)).next(Advice::ListJobs)),
        },
        Some(JobState::Aborted) => {
            Err(Problem::failed(format!("job {} was aborted", job.id)).next(Advice::ResumeJob(job.id)))
        }
        Some(JobState::Running) | None => {
            Err(Problem::failed(format!("job {} is {}", job.id, job.state)).next(Advice::ListJobs))
        }
    }
}

/// Follows a job, or the only one that runs, until it ends. Whoever stops following stops nothing.
pub(super) async fn follow(
    id: Option<i64>,
    client: &mut Client,
    printer: &Printer,
) -> Result<JobView, Problem> {
    let bar = match printer.shows_progress() {
        true => ProgressBar::new(0),
        false => ProgressBar::hidden(),
    };
    bar.set_style(ProgressStyle::with_template("{prefix} {bar:40} {msg}").expect("the template is valid"));
    let last = follow_with(id, &bar, client, printer).await;
    bar.finish_and_clear();
    last
}

async fn follow_with(
    id: Option<i64>,
    bar: &ProgressBar,
    client: &mut Client,
    printer: &Printer,
) -> Result<JobView, Problem> {
    let (mut last, mut broken): (Option<JobView>, _) = (None, None);
    let (connection, socket, patience) = client.connection();
    let interrupted = tokio::signal::ctrl_c();
    pin_mut!(interrupted);
    match connection.watch_job(id).await {
        Ok(replies) => {
            pin_mut!(replies);
            loop {
                let reply = tokio::select! {
                    reply = patience.wait(socket, replies.next()) => reply,
                    _ = &mut interrupted => {
                        bar.finish_and_clear();
                        leave(last.as_ref().map(|job| job.id).or(id));
                    }
                };
                let reply = match reply {
                    Ok(Some(reply)) => reply,
                    Ok(None) => break,
                    Err(silence) => return Err(silent(socket, silence).await),
                };
                match reply {
                    Ok(view) => {
                        let view = view.map_err(Problem::from)?.job;
                        show(&view, last.as_ref(), bar, printer);
                        last = Some(view);
                    }
                    Err(error) => {
                        broken = Some(error);
                        break;
                    }
                }
            }
        }
        Err(error) => broken = Some(error),
    }
    match (broken, last) {
        (None, Some(view)) if view.state != JobState::Running.into() => Ok(view),
        (Some(error), None) => Err(client.broken(&error).await),
        (_, last) => Err(Problem::unreachable("virtseald ended before the job did").next(
            Advice::StartDaemon
                .within("the job goes on")
                .then(last.map_or(Advice::ListJobs, |job| Advice::WatchJob(job.id))),
        )),
    }
}

/// At Ctrl-C: says how to come back, and ends by that signal, which the shell of a script looks at.
fn leave(job: Option<i64>) -> ! {
    let (what, next) = match job {
        Some(id) => (format!("job {id} goes on"), Advice::WatchJob(id)),
        None => ("the job goes on".to_owned(), Advice::ListJobs),
    };
    super::out::note(&format!("{what}. Next: {next}"));
    // SAFETY: the default action is set in the place of tokio's handler, and no other thread of this program relies on that.
    let _ = unsafe { signal(Signal::SIGINT, SigHandler::SigDfl) };
    let _ = raise(Signal::SIGINT);
    std::process::exit(128 + Signal::SIGINT as i32)
}

fn show(view: &JobView, before: Option<&JobView>, bar: &ProgressBar, printer: &Printer) {
    bar.set_prefix(visible(&view.task).into_owned());
    bar.set_length(view.total.max(view.seen).unsigned_abs());
    bar.set_position(view.seen.unsigned_abs());
    bar.set_message(progress(view));
    if let Some(waiting) = &view.waiting
        && before.is_none_or(|before| before.waiting.as_ref() != Some(waiting))
    {
        let what = format!("job {} waits: {waiting}", view.id);
        let waits = Finding::warning(FindingCode::JobWaits, Subject::Job(view.id), what);
        bar.suspend(|| printer.warn(waits));
    }
}

/// What was typed to confirm a loss: as an option, or at a prompt.
pub(super) fn typed(given: Option<String>, question: &str) -> Result<String, Problem> {
    if let Some(given) = given {
        return Ok(given);
    }
    if !std::io::stdin().is_terminal() {
        return Ok(String::new());
    }
    let failed = |error: std::io::Error| Problem::from_error(Code::Failed, "can't ask", &error);
    let mut line = String::new();
    super::out::question(question).map_err(failed)?;
    std::io::stdin().read_line(&mut line).map_err(failed)?;
    Ok(line.trim().to_owned())
}

import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;

/** An unmodified Java HttpClient: METHOD URL. It knows of no proxy and of no token. */
public final class WithHttpClient {
    private WithHttpClient() {}

    public static void main(String[] arguments) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(arguments[1]))
                .method(arguments[0], HttpRequest.BodyPublishers.noBody())
                .build();
        var response = HttpClient.newHttpClient().send(request, BodyHandlers.ofString());
        System.out.printf("{\"status\": %d, \"body\": %s}%n", response.statusCode(), response.body());
    }
}
